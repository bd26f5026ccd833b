"""Preference tuning from the command line: pairs, the tuned teacher, a student of it, and one file of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli.test_tune_command import sd15
from networks import randomise_path
from PIL import Image

from distill_core.cli.main import main
from distill_core.cli.plan import plan_of
from distill_core.cli.sample import load_student
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.noise import ItemNoise
from distill_core.files import load_tensors, save_tensors
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser
from distill_core.models.lora_stack import put_into_weights
from distill_core.models.mini import mini_conditioning
from distill_core.models.scorers import class_score
from distill_core.training.config import load_config
from distill_core.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIG = """
method = "dpo"
[model]
lora_rank = 2
[preference]
samples = 2
[cache]
count = 8
steps = 2
guidance = 1.5
sizes = [[8, 8]]
batch_size = 4
[train]
steps = 3
batch_size = 4
validation = 2
[discriminator]
width = 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs, a tuned teacher, and a config of a student of it."""
    root = tmp_path_factory.mktemp("dpo")
    (root / "dpo.toml").write_text(CONFIG)
    assert main(["cache", str(root / "dpo.toml"), "--out", str(root / "pairs")]) == 0
    assert main(["train", str(root / "dpo.toml"), "--data", str(root / "pairs"), "--out", str(root / "dpo")]) == 0
    ladd = CONFIG.replace('method = "dpo"', "").replace("samples = 2", "samples = 0").replace("validation = 2", "")
    (root / "ladd.toml").write_text(f"{ladd}[teacher]\nlora = '{root}/dpo/student.safetensors'\n")
    return root


def run(command: str, root: Path, name: str, *more) -> int:
    return main([command, str(root / f"{name}.toml"), *map(str, more)])


def test_the_pairs_are_ranked_by_the_classifier(folder):
    dataset = LatentDataset(folder / "pairs")
    assert len(dataset) == 8 and dataset.manifest()["scorer"] == "classifier"
    (bucket,) = dataset.buckets.values()
    batch, names = dataset.read(sorted(bucket)), list(mini.CLASS_NAMES[:8])
    decoder = mini.load_autoencoder().decoder
    with torch.no_grad():
        best, worst = (class_score(decoder(x).clamp(-1, 1), names) for x in (batch.latents, batch.beside["rejected"]))
    assert (best > worst).all()


def test_the_tuned_teacher_is_a_lora_without_levels(folder, tmp_path, capsys):
    state, description = read_lora(folder / "dpo" / "student.safetensors")
    assert description["method"] == "Diffusion-DPO" and "sigmas" not in description and len(state) > 2
    logs = RunFolder(folder / "dpo").logs()
    assert {"implicit_accuracy", "margin", "validation_accuracy"} <= logs[-1].keys()
    assert logs[0]["preference"] == pytest.approx(0.6931, abs=1e-4) and logs[0]["margin"] == 0
    assert list((folder / "dpo" / "samples").iterdir())
    lora = folder / "dpo" / "student.safetensors"
    assert run("sample", folder, "ladd", "--count", 2, "--out", tmp_path / "x") == 0  # through [teacher] lora
    assert run("sample", folder, "dpo", "--lora", lora, "--out", tmp_path / "y") == 2
    assert "has no noise levels of its own" in capsys.readouterr().err


def test_a_student_of_the_tuned_teacher_takes_the_lora_in(folder, tmp_path):
    """The chain of docs/dpo.md; one file of both is exactly the two beside each other."""
    assert run("cache", folder, "ladd", "--out", folder / "data") == 0
    assert run("train", folder, "ladd", "--data", folder / "data", "--out", folder / "run") == 0
    student, lora = folder / "run" / "student.safetensors", folder / "strong.safetensors"
    strong = randomise_path(mini.mini_backend().new_lora(3), size=0.02)
    save_tensors(lora, strong.export(), {})
    merged = tmp_path / "both.safetensors"
    assert run("merge", folder, "ladd", "--lora", student, "--add", lora, "--weight", 0.5, "--out", merged) == 0

    cond, _ = mini_conditioning()
    x, sigma = ItemNoise(0, range(2)).normal(*mini.LATENT_SHAPE), torch.tensor([1.0, 0.5])
    source, alone, description = load_student(load_config(folder / "ladd.toml"), merged)
    state, said = read_lora(student)
    backend = mini.mini_backend()
    half = backend.read_lora(str(lora)).weighted(0.5)
    put_into_weights(backend.network, half)
    stacked = Denoiser(backend, backend.open_lora(state))
    with torch.no_grad():
        a, b = alone(x, sigma, cond[:2]), stacked(x, sigma, cond[:2])
        student_alone = Denoiser(source.backend, source.backend.open_lora(state))(x, sigma, cond[:2])
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert (a - student_alone).abs().max() > 1e-2
    kept = ("sigmas", "sampler", "cfg", "method", "base", "teacher", "config", "steps")
    assert all(description[name] == said[name] for name in kept) and description["warnings"] == []
    assert [(lora["name"], lora["strength"]) for lora in description["added"]] == [("strong.safetensors", 0.5)]
    both = load_tensors(merged)[0]
    first = next(name for name in both if "lora_A" in name)
    assert len(both[first]) == 2 + 3 and both[first].dtype == torch.float32


def test_layers_that_only_one_of_them_has_are_kept(folder, tmp_path):
    """Ranks then differ from layer to layer."""
    student, backend = folder / "dpo" / "student.safetensors", mini.mini_backend()
    some = randomise_path(backend.new_lora(3, backend.lora_targets()[:2]), size=0.02)
    save_tensors(tmp_path / "some.safetensors", some.export(), {})
    out = tmp_path / "one.safetensors"
    assert run("merge", folder, "dpo", "--lora", student, "--add", tmp_path / "some.safetensors", "--out", out) == 0
    state, _ = read_lora(out)
    ranks = [len(value) for name, value in state.items() if "lora_A" in name]
    assert sorted(set(ranks)) == [2, 5]
    cond, _ = mini_conditioning()
    x, sigma = ItemNoise(0, range(2)).normal(*mini.LATENT_SHAPE), torch.tensor([0.9, 0.5])
    put_into_weights(backend.network, backend.read_lora(str(tmp_path / "some.safetensors")))
    other = mini.mini_backend()
    with torch.no_grad():
        stacked = Denoiser(backend, backend.open_lora(read_lora(student)[0]))(x, sigma, cond[:2])
        one = Denoiser(other, other.open_lora(state))(x, sigma, cond[:2])
    torch.testing.assert_close(one, stacked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", ["0", "nan", "much", "1e9"])
def test_weights_that_are_none_are_refused(folder, weight, capsys):
    lora = folder / "dpo" / "student.safetensors"
    with pytest.raises(SystemExit):
        run("merge", folder, "dpo", "--lora", lora, "--add", lora, "--weight", weight, "--out", folder / "no")
    assert "must be a number from -100 to 100 other than 0" in capsys.readouterr().err


def test_a_lora_of_another_model_is_not_added(folder, capsys):
    lora = folder / "dpo" / "student.safetensors"
    save_tensors(folder / "other.safetensors", {"unet.x.lora_A.weight": torch.ones(1, 2)}, {})
    out = folder / "no.safetensors"
    assert run("merge", folder, "dpo", "--lora", lora, "--add", folder / "other.safetensors", "--out", out) == 2
    assert "other.safetensors changes 1 layers that are no linear layers of this model" in capsys.readouterr().err
    assert run("merge", folder, "dpo", "--lora", lora, "--out", out) == 2
    assert "--add names one" in capsys.readouterr().err and not out.exists()


def test_killed_while_it_ranks_it_goes_on_to_the_same_pairs(folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG.replace("count = 8", "count = 48"))
    command = ["cache", str(tmp_path / "c.toml"), "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-m", "distill_core", *command, str(stopped)], env=environment)
    deadline = time.monotonic() + 300
    while not list(stopped.glob("*.part-*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(stopped.glob("*.part-*.safetensors")), "it was killed while it made pairs"
    for out in (stopped, whole):
        assert main([*command, str(out)]) == 0
    (a,), (b,) = (sorted(out.glob("shard-*")) for out in (stopped, whole))
    assert a.read_bytes() == b.read_bytes()


def test_a_turbo_is_tuned_at_its_own_levels(folder, tmp_path, capsys):
    turbo = CONFIG.replace("[model]", '[model]\nloras = ["mini"]').replace("guidance = 1.5", "guidance = 1")
    (tmp_path / "c.toml").write_text(f'{turbo}[dpo]\npreference_levels = "student"\n')
    assert run("cache", tmp_path, "c", "--out", tmp_path / "pairs") == 0
    assert run("train", tmp_path, "c", "--data", tmp_path / "pairs", "--out", tmp_path / "run") == 0
    assert "the turbo is used at 1, 0.75, 0.5, 0.25 with ancestral" in capsys.readouterr().out
    _, description = read_lora(tmp_path / "run" / "student.safetensors")
    assert description["sigmas"] == [1.0, 0.75, 0.5, 0.25] and description["sampler"] == "ancestral"
    assert [lora["name"] for lora in description["below"]] == ["student.safetensors"]
    assert "retention" in RunFolder(tmp_path / "run").logs()[-1]


def test_memory_is_planned_with_the_pairs(folder):
    plans = {}
    for size in (4, 8):
        (folder / "p.toml").write_text(CONFIG.replace("batch_size = 4\nvalidation", f"batch_size = {size}\nvalidation"))
        plans[size] = plan_of(load_config(folder / "p.toml"), card=False)
    assert plans[8].peak > plans[4].peak
    measured = plan_of(load_config(folder / "dpo.toml"), LatentDataset(folder / "pairs"), card=False)
    assert measured.peak == pytest.approx(plans[4].peak, rel=0.05) and measured.forwards >= 2


@pytest.mark.parametrize(
    "change, command, words",
    [
        (("samples = 2", "samples = 0"), "train", "which this method learns from: make pairs with `cache`"),
        (("[train]", "[teacher]\npath = 'mini'\n[train]"), "train", "with Diffusion-DPO the model is its own teacher"),
        (("samples = 2", "samples = 2\nscorer = 'nowhere.py'"), "cache", "there is no scorer nowhere.py"),
        (("count = 8", "count = 8\nstate_sigmas = [1.0]"), "cache", "state_sigmas are of the teacher's paths"),
        (("count = 8", "count = 8\nseed = 3"), "again", "[cache] seed is 3 now, was 0"),
        (("samples = 2", "samples = 3"), "again", "[preference] samples is 3 now, was 2"),
        (("samples = 2", "samples = 0"), "again", "[preference] samples is left out now"),
    ],
)
def test_what_cannot_be_is_said(folder, tmp_path, capsys, change, command, words):
    (tmp_path / "c.toml").write_text(CONFIG.replace(*change))
    data = folder / "pairs"
    if command == "train":
        if "samples" in change[0]:
            data = tmp_path / "plain"
            assert run("cache", tmp_path, "c", "--out", data) == 0
        assert run("train", tmp_path, "c", "--data", data, "--out", tmp_path / "run") == 2
    else:
        assert run("cache", tmp_path, "c", "--out", data if command == "again" else tmp_path / "new") == 2
    assert words in capsys.readouterr().err


def test_pairs_of_pictures_train_any_family(tmp_path, capsys):
    """A tiny SD 1.5: folders of chosen and rejected pictures, and samples that a scorer of one's own ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd15().save_pretrained(tmp_path / "model")
    for which in ("chosen", "rejected"):
        (tmp_path / which).mkdir()
        for number in range(4):
            picture = Image.effect_noise((64, 64), 40 + number + 20 * (which == "chosen")).convert("RGB")
            picture.save(tmp_path / which / f"{number}.png")
            (tmp_path / which / f"{number}.txt").write_text("a red dog")
    (tmp_path / "prompts.txt").write_text("a red dog\ncat\n")
    (tmp_path / "scorer.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "c.toml").write_text(
        CONFIG.replace("[model]", f"[model]\npath = '{tmp_path / 'model'}'")
        .replace("samples = 2", f"samples = 2\nscorer = '{tmp_path / 'scorer.py'}'")
        .replace("validation = 2", "validation = 1")
        + f"[prompts]\nprompts = '{tmp_path / 'prompts.txt'}'\n"
    )
    of_pictures = f"[pictures]\nsize = 64\nstep = 16\nrejected = '{tmp_path / 'rejected'}'\n"
    (tmp_path / "p.toml").write_text((tmp_path / "c.toml").read_text() + of_pictures)
    folders = ("--images", tmp_path / "chosen")
    assert run("cache", tmp_path, "p", *folders, "--out", tmp_path / "pictures") == 0
    assert run("cache", tmp_path, "c", "--out", tmp_path / "ranked") == 0
    for data in ("pictures", "ranked"):
        command = ("train", tmp_path, "c", "--data", tmp_path / data, "--out", tmp_path / f"run-{data}")
        assert run(*command, "--no-preflight") == 0
        logs = RunFolder(tmp_path / f"run-{data}").logs()
        assert logs[0]["margin"] == 0 and all(entry["preference"] > 0 for entry in logs)
    assert run("cache", tmp_path, "p", "--out", tmp_path / "no") == 2
    assert "give both" in capsys.readouterr().err
    assert run("cache", tmp_path, "c", "--data", tmp_path / "ranked", "--out", tmp_path / "no") == 2
    assert "leave --data out" in capsys.readouterr().err
    text = (tmp_path / "c.toml").read_text()
    (tmp_path / "d.toml").write_text(text.replace(f"scorer = '{tmp_path / 'scorer.py'}'", ""))
    assert run("cache", tmp_path, "d", "--out", tmp_path / "no") == 2
    assert "is for the shipped models alone" in capsys.readouterr().err
    (tmp_path / "e.toml").write_text(text + of_pictures + '[masks]\nsource = "random"\n')
    assert run("cache", tmp_path, "e", *folders, "--out", tmp_path / "no") == 2
    assert "pairs have no masks" in capsys.readouterr().err
