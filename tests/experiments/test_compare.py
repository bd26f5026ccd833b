"""The comparison: results are written run by run, kept, and summarised with their spread."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

from distill_core.cli.main import main
from distill_core.diffusion.noise import ItemNoise
from distill_core.evaluation.intervals import Figure
from distill_core.experiments import compare, grounds, results, tables
from distill_core.methods.add import ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.models.mini import mini_conditioning


def clothes(count, steps=4, **changes):
    """The ground with a dataset of ``count`` items."""
    ground = grounds.clothes()
    return replace(ground, cache=replace(ground.cache, count=count, steps=steps, batch_size=32), **changes)


@pytest.fixture
def small(monkeypatch):
    """Two entries of two steps, 20 images, a dataset of 16."""
    names = ("Diffusion2GAN", "consistency only")
    short = {
        name: replace(compare.ENTRIES[name], train=replace(compare.ENTRIES[name].train, steps=2, batch_size=4))
        for name in names
    }
    monkeypatch.setattr(compare, "ENTRIES", short)
    monkeypatch.setattr(compare, "OWN_IMAGES", 10)
    monkeypatch.setattr(compare, "REFERENCE_IMAGES", 12)
    monkeypatch.setitem(compare.GROUNDS, "clothes", lambda: clothes(32, teacher_steps=(1, 2)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return names


def test_a_comparison_goes_on_where_it_was(small, tmp_path, monkeypatch):
    first, second = small
    trained = []
    run_entry = compare.run_entry

    def watch(out, seed, name, *more):
        trained.append((seed, name))
        run_entry(out, seed, name, *more)

    monkeypatch.setattr(compare, "run_entry", watch)
    arguments = ["compare", "--out", str(tmp_path), "--seeds", "7", "--images", "20"]
    assert main([*arguments, "--entries", first]) == 0
    assert main([*arguments, "--entries", first, second]) == 0
    assert trained == [(7, first), (7, second)]
    result = json.loads(compare.result_path(tmp_path, first, 7).read_text())
    assert result["entry"] == first and result["steps"] == 2 and result["cpu_s"] > 0 and list(result["scores"]) == ["1"]
    figures = {"fd", "fd_pixels", "accuracy", "diversity", "drift", "detail_error", "coverage", "coherence"}
    assert figures <= result["scores"]["1"].keys() and result["images"] == 20
    fd = result["scores"]["1"]["fd"]
    assert fd["low"] < fd["value"] < fd["high"]
    # 16 real latents calibrate the heads; a step passes 4 fakes twice and 4 reals once, the first R1's one item on top
    assert result["forwards"]["discriminator copy"] == 16 + 2 * (4 + 4 + 4) + 1 - 16
    # and two steps of 4 through the student's backbone: none of the 20 images that were scored
    assert result["forwards"]["backbone"] == 2 * 4
    table = (tmp_path / "table.md").read_text()
    assert "not run" in (tmp_path / "claims.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert all(name in table for name in ("teacher", first, second)) and table.count("| consistency only |") == 3
    # The teacher at its most steps is what the others are set beside: its own pictures are its own.
    teacher = results.read_result(tmp_path / "teacher.json")
    assert teacher["seed"] is None and teacher["scores"]["2"]["drift"].value == 0
    student = results.read_result(compare.result_path(tmp_path, first, 7))
    apart = student["scores"]["1"]["fd"] - teacher["scores"]["2"]["fd"]
    assert len(apart.replicates) == 400 and apart.interval()[0] < apart.value < apart.interval()[1]


def test_results_of_another_number_of_images_are_refused(small, tmp_path, capsys):
    """fd depends on the number; a table of both would be wrong."""
    path = compare.result_path(tmp_path, small[0], 7)
    old = {"entry": small[0], "seed": 7, "scores": {"1": {"fd": 3.0}}}  # as 0.2 wrote it
    for content, found in ((old, "another number of"), ({**old, "images": 1000}, "1000")):
        path.write_text(json.dumps(content))
        assert main(["compare", "--out", str(tmp_path), "--seeds", "7", "--entries", small[0]]) == 2
        assert f"scored on {found} images, not 10000" in capsys.readouterr().err
    assert results.read_result(path)["scores"]["1"]["fd"].value == 3.0


def test_a_count_of_forwards_ends_with_the_training(small, tmp_path):
    ground = clothes(16, steps=2)
    ground.cache_dataset(0, tmp_path)
    run, cost = compare.train_entry(ground, compare.ENTRIES["Diffusion2GAN"], compare.LatentDataset(tmp_path), 0)
    before = dict(cost["forwards"])
    ground.samples(run.method.student, 2, 10, sampler="euler")
    assert cost["forwards"] == before
    assert not run.method.student.backend.network._forward_pre_hooks


def test_unknown_entries_are_refused(tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path), "--entries", "LCM"]) == 2
    assert "no entry ['LCM']" in capsys.readouterr().err


def test_entries_on_photographs_need_them(small, tmp_path, capsys, monkeypatch):
    first = small[0]
    entries = {first: replace(compare.ENTRIES[first], real=True)}
    monkeypatch.setattr(compare, "ENTRIES", entries)
    assert main(["compare", "--out", str(tmp_path), "--photographs", str(tmp_path / "none")]) == 2
    assert "Fashion-MNIST" in capsys.readouterr().err


def test_photographs_become_a_dataset_of_their_classes(tmp_path, monkeypatch):
    ground = clothes(40)
    pixels = torch.randint(256, (60, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(60, dtype=torch.uint8) % 10
    for name, header, data in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + data.numpy().tobytes())
    monkeypatch.setattr("distill_core.data.real.SHARD_SIZE", 25)
    ground.cache_photographs(tmp_path, 3, tmp_path / "photographs")
    (tmp_path / "photographs" / "shard-00001.safetensors").unlink()  # stopped half way
    ground.cache_photographs(tmp_path, 3, tmp_path / "photographs")
    dataset = compare.LatentDataset(tmp_path / "photographs")
    batch = dataset.batch(0, 40, 0)
    assert len(dataset) == 40 and batch.latents.shape == (40, 16, 8, 8) and batch.states is None
    classes, _ = mini_conditioning()
    assert all(any(torch.equal(row, known) for known in classes.pooled) for row in batch.cond.pooled)


def test_the_table_gives_medians_and_intervals():
    def run(seed, fd):
        spread = torch.linspace(-1, 1, 401)
        scores = {"fd": Figure(fd, fd + spread), "accuracy": Figure(0.9, 0.9 + 0.02 * spread)}
        forwards = {"backbone": 7, "vision": 2}
        return {"seed": seed, "scores": {"1": scores}, "cpu_s": 40.0, "wall_s": 90.0, "forwards": forwards}

    lines = tables.table({"ADD": [run(0, 3.0), run(1, 1.0), run(2, 2.0)]}).splitlines()
    assert "| ADD | 1 | 3 | 2.00 [0.05, 3.95] |  | 90.0 [88.1, 91.9] |" in lines[2]
    assert lines[2].endswith("| 40 | 90 | 9 |")


def test_every_method_is_compared_and_no_seed_was_tuned_on():
    kinds = {type(entry.method) for entry in compare.ENTRIES.values()}
    assert kinds == {LADDConfig, ADDConfig, Diffusion2GANConfig, DMD2Config}
    assert len(compare.ENTRIES) >= 6


def test_a_random_student_shares_nothing_with_the_teacher(tmp_path):
    ground = clothes(16, steps=2)
    ground.cache_dataset(0, tmp_path)
    entry = replace(compare.ENTRIES["pairs only"], pretrained=False)
    method = compare.prepare(ground, entry, compare.LatentDataset(tmp_path), 0).method
    student, teacher = method.student.backend.network, method.teacher.backend.network
    pairs = zip(student.named_parameters(), teacher.parameters(), strict=True)
    same = [name for (name, a), b in pairs if a.ndim > 1 and torch.equal(a, b)]
    assert same == [] and all(p.requires_grad for p in student.parameters())


def test_a_share_of_real_pictures_is_a_mix(tmp_path):
    entry = compare.ENTRIES["LADD"]
    assert compare.data_of(entry, tmp_path, 3) == tmp_path / "dataset-3"
    assert compare.data_of(replace(entry, real=1.0), tmp_path, 3) == tmp_path / "photographs-3"
    parts = dict(compare.data_of(replace(entry, real=0.25), tmp_path, 3).parts)
    assert parts == {tmp_path / "dataset-3": 0.75, tmp_path / "photographs-3": 0.25}


def test_an_entry_trains_a_lora_or_all_weights(tmp_path):
    ground = clothes(16, steps=2)
    ground.cache_dataset(0, tmp_path)
    dataset = compare.LatentDataset(tmp_path)
    for name, rank in (("KD", 32), ("KD, all weights", 0), ("rival: KD", 0)):
        method = compare.prepare(ground, compare.ENTRIES[name], dataset, 0).method
        assert (method.student.lora.rank if rank else method.student.lora or 0) == rank
        assert method.discriminator is None and method.active(dataset.batch(0, 4, 0)) == ["pairs"]
        step = method.start(dataset.batch(0, 16, 0), ItemNoise(0, range(16)), 0)
        assert step.on_path.all() and len(step.sigma.unique()) == 4  # every item starts from a stored state
    assert compare.result_path(tmp_path, "rival: KD", 7).name == "rival_KD-7.json"


def test_a_budget_is_a_factor_on_steps(small, tmp_path, capsys):
    late = replace(compare.ENTRIES[small[0]], method=LADDConfig({"pairs": 1.0}, warmup_steps=30, adversarial_from=88))
    longer = late.longer(2.5)
    assert (longer.train.steps, longer.method.warmup_steps, longer.method.adversarial_from) == (5, 75, 220)
    assert late.longer(1.0) == late and late.longer(0.01).train.steps == 1
    arguments = ["compare", "--out", str(tmp_path), "--seeds", "7", "--images", "20", "--entries", small[0]]
    assert main([*arguments, "--budget", "1.5"]) == 0
    written = json.loads(compare.result_path(tmp_path, small[0], 7).read_text())
    assert written["steps"] == 3 and written["budget"] == 1.5
    capsys.readouterr()
    assert main(arguments) == 2
    assert "trained for 1.5 times its entry's steps, not 1" in capsys.readouterr().err
    assert main([*arguments, "--budget", "0"]) == 2
    assert "--budget must be a number above 0, not 0.0" in capsys.readouterr().err
