import copy
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from networks import build_cond, build_network
from toy import LEVELS, ToyBackend, ToyEncoder, cache_toy, toy_run

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.process import FlowProcess
from distill_core.digests import fingerprint
from distill_core.files import load_tensors, save_json, save_tensors
from distill_core.lora_files import read_lora, save_lora
from distill_core.methods.add import ADDConfig
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.config import MethodConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import METHODS
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.settings import settings_of
from distill_core.training import loop, progress
from distill_core.training.loop import Event, TrainConfig, train
from distill_core.training.monitor import Collapse, Condition, Health
from distill_core.training.progress import StatusLine
from distill_core.training.run import RunConfig, StudentConfig, new_run, student_of, train_to_end
from distill_core.training.run_folder import RunFolder, folder_in
from distill_core.training.student import pick_targets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["run", "my turbo 2", "a.b+c-d_e", "ünï", " padded "])
def test_a_name_is_a_folder_inside_the_root(tmp_path, name):
    assert folder_in(tmp_path, name) == tmp_path / name.strip()


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../out",
        "a/b",
        "a\\b",
        "/etc",
        "C:\\x",
        ".hidden",
        "dot.",
        "con",
        "NUL.txt",
        "x" * 201,
        "a\nb",
    ],
)
def test_a_name_that_could_lead_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a folder inside"):
        folder_in(tmp_path, name)


@pytest.mark.case("training D9", "a run's or dataset's folder may be a link to another disk; one to nowhere is named")
def test_a_folder_may_be_a_link(tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    root.mkdir()
    disk.mkdir()
    (disk / "file").touch()
    for name, target in {
        "link": disk,
        "gone": tmp_path / "x",
        "file": disk / "file",
        "circle": root / "circle",
    }.items():
        (root / name).symlink_to(target)
    save_json(folder_in(root, "link") / "a.json", {})
    assert (disk / "a.json").exists()
    for name in ("gone", "file", "circle"):
        with pytest.raises(ValueError, match="is a link that leads to no folder"):
            folder_in(root, name)


def toy_config(dataset, run) -> RunConfig:
    """What describes a toy run, as far as its files ask."""
    identities = {"base": "toy", "dataset": dataset.digest()}
    return RunConfig(LADDConfig(), run.config, StudentConfig(2), identities)


class Exporting(ToyBackend):
    """A toy backbone that writes files."""

    def export(self, lora):
        return lora.export()

    def description(self):
        return {"prediction": "flow", "shift_alpha": "1.0", "family": "toy", "base": "toy"}


def train_toy(dataset, path: Path, watchers=(), **settings) -> None:
    """A toy run to its end, as both the command line and the nodes train."""
    run = toy_run(dataset, path, **settings)
    for view in (run.method.student, run.method.teacher):
        view.backend.__class__ = Exporting
    train_to_end(run, toy_config(dataset, run), RunFolder(path), path / "student.safetensors", watchers)


class StoppedHere(Exception):
    pass


def stop_at(step: int):
    """A watcher that ends the run, as a cancel does."""

    def watch(event, condition) -> None:
        if event.step == step:
            raise StoppedHere

    return watch


@pytest.mark.case("attack 9", "lines of a log that are no entries are left out, and the run goes on")
def test_the_log_has_every_step_once_also_after_a_crash(dataset, tmp_path):
    """A run is stopped at step 4, then its log claims two steps that its checkpoint does not know, one cut off."""
    folder = RunFolder(tmp_path)
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path, [stop_at(4)])
    with open(folder.log, "a") as log:
        log.write(json.dumps({"step": 5, "adversarial": 123.0}) + '\n[6]\n{"step": 6, "adver')
    assert [entry["step"] for entry in folder.logs()] == [1, 2, 3, 4, 5]
    resumed = []
    train_toy(dataset, tmp_path, [lambda event, condition: resumed.append(event.step)])
    assert resumed == [5, 6]
    logs = folder.logs()
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6] and logs[4]["adversarial"] != 123.0
    whole = [event.logs for event in train(toy_run(dataset))]
    assert {entry.pop("health") for entry in logs} == {"starting"}
    assert [entry | {"step": 0} for entry in logs] == [entry | {"step": 0} for entry in whole]


def test_stopping_writes_checkpoint_and_student_at_once(dataset, tmp_path):
    """Before a watcher's exception is out, whatever it is; a cancel of the host is no Exception."""
    for kind in (KeyboardInterrupt, SystemExit, BaseException):
        folder = tmp_path / kind.__name__

        def stop(event, condition, kind=kind, folder=folder):
            assert not (folder / "checkpoint.safetensors").exists()
            raise kind

        with pytest.raises(kind):
            train_toy(dataset, folder, [stop])
        assert (folder / "checkpoint.safetensors").exists() and not RunFolder(folder).report.exists()
        assert read_lora(folder / "student.safetensors")[1]["steps"] == 1


def test_a_stopped_run_ends_as_one_that_was_not(dataset, tmp_path):
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path / "a", [stop_at(3)])
    train_toy(dataset, tmp_path / "a")
    train_toy(dataset, tmp_path / "b")
    for name in ("log.jsonl", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for name in ("student.safetensors", "checkpoint.safetensors"):
        (a, about_a), (b, about_b) = (load_tensors(tmp_path / x / name) for x in "ab")
        assert a.keys() == b.keys() and about_a == about_b
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_a_student_that_cannot_be_written_does_not_hide_why_the_run_stopped(dataset, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("distill_core.training.run.save_lora", full)
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path, [stop_at(2)])
    assert "could not be written: No space left" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        train_toy(dataset, tmp_path)


def test_the_condition_is_that_of_the_last_step(dataset, tmp_path):
    folder, conditions = RunFolder(tmp_path), []
    assert folder.condition() is None
    train_toy(dataset, tmp_path, [lambda event, condition: conditions.append(condition)], steps=25)
    assert folder.condition() == conditions[-1]
    assert conditions[0].word == "starting" and conditions[-1].word != "starting"


def test_a_report_answers_only_what_was_requested(tmp_path):
    folder, request = RunFolder(tmp_path), {"steps": 5, "levels": (1.0, 0.5)}
    assert folder.finished(request) is None
    folder.finish(request, word="healthy")
    assert folder.finished(request)["word"] == "healthy"
    assert folder.finished({**request, "steps": 6}) is None
    folder.report.write_text("{")
    assert folder.finished(request) is None
    with pytest.raises(ValueError, match="there is no run in"):
        folder.started()


def test_a_run_without_identities_is_refused():
    for identities in ({}, {"base": "a"}, {"dataset": "b"}):
        with pytest.raises(ValueError, match="must say what it is made from"):
            RunConfig(LADDConfig(), TrainConfig(), StudentConfig(), identities)


def test_targets_by_parts_of_their_names():
    names = ["blocks.0.attn.q", "blocks.0.mlp", "blocks.1.attn.q"]
    assert pick_targets(names, ()) == tuple(names)
    assert pick_targets(names, ["attn"]) == ("blocks.0.attn.q", "blocks.1.attn.q")
    assert pick_targets(names, ["mlp", "blocks.1"]) == ("blocks.0.mlp", "blocks.1.attn.q")
    assert pick_targets([*names, "single_blocks.0.mlp"], ["blocks.0.mlp"]) == ("blocks.0.mlp",), "a whole name is one"
    with pytest.raises(ValueError, match="no layer's name contains 'conv'; names look like blocks.0.attn.q"):
        pick_targets(names, ["attn", "conv"])


def test_targets_by_patterns_and_what_is_left_out():
    names = [f"blocks.{i}.{part}" for i in (0, 1, 10) for part in ("attn.q", "attn.to_out", "ff.0")]
    assert pick_targets(names, ["!ff"]) == tuple(name for name in names if "ff" not in name)
    assert pick_targets(names, ["attn", "!to_out", "!blocks.10."]) == ("blocks.0.attn.q", "blocks.1.attn.q")
    assert pick_targets(names, ["blocks.1*.attn"]) == tuple(
        n for n in names if n.startswith("blocks.1") and "attn" in n
    )
    assert pick_targets(names, ["blocks.?.ff"]) == ("blocks.0.ff.0", "blocks.1.ff.0")
    for wrong in (["!fff"], ["attn", "! "], ["blocks.2*"], ["*.ff.1"]):
        with pytest.raises(ValueError, match="no layer's name contains"):
            pick_targets(names, wrong)
    with pytest.raises(ValueError, match="leave no layer to train"):
        pick_targets(names, ["ff", "!blocks"])


# Snapshots and the console


def test_snapshots_are_the_students_of_their_steps_and_the_last_is_the_run_s_own(dataset, tmp_path):
    train_toy(dataset, tmp_path / "whole", snapshot_every=2)
    kept = sorted(path.name for path in (tmp_path / "whole" / "snapshots").iterdir())
    assert kept == ["student_step000002.safetensors", "student_step000004.safetensors"]
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path / "short", [stop_at(4)])
    expected, said = read_lora(tmp_path / "short" / "student.safetensors")
    state, description = read_lora(tmp_path / "whole" / "snapshots" / kept[1])
    assert description["steps"] == said["steps"] == 4
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_validation_is_in_the_log_and_the_same_after_a_stop(dataset, tmp_path):
    changes = dict(validation=0.25, validation_every=2)
    train_toy(dataset, tmp_path / "whole", **changes)
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path / "stopped", [stop_at(3)], **changes)
    train_toy(dataset, tmp_path / "stopped", **changes)
    logs = [RunFolder(tmp_path / name).log.read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and [i + 1 for i, text in enumerate(logs[0].splitlines()) if "validation" in text] == [
        1,
        2,
        4,
        6,
    ]


def test_no_snapshots_by_default(dataset, tmp_path):
    train_toy(dataset, tmp_path)
    assert not (tmp_path / "snapshots").exists()


def test_the_console_line_says_step_losses_pace_time_left_and_status(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    line = StatusLine(5, ("adversarial", "pairs"), lines.append)
    for step in range(11, 32):
        line(Event(step, 31, {"adversarial": 0.5, "discriminator": 2.0, "rate": 1.0}), Condition("healthy"))
    assert len(lines) == 5  # 15, 20, 25, 30 and the last
    assert lines[0] == ("step 15 of 31, adversarial 0.500, discriminator 2.000, 2 s/step, 0:00:32 left, healthy")
    assert lines[-1].startswith("step 31 of 31") and "0:00:00 left" in lines[-1]
    line = StatusLine(5, (), lines.append)
    for step, logs in ((3, {"validation": 0.25}), (4, {}), (5, {})):  # the last that was measured
        line(Event(step, 31, logs), Condition("healthy"))
    assert lines.pop().startswith("step 5 of 31, validation 0.250, ")
    silent = StatusLine(0, (), lines.append)
    silent(Event(50, 50, {}), Condition("healthy"))
    assert len(lines) == 5


# A whole run


@pytest.fixture(scope="module")
def sd3_data(tmp_path_factory) -> Path:
    backend = DiffusersBackend(build_network("sd3"), FlowProcess())
    folder, conds = tmp_path_factory.mktemp("sd3"), build_cond(3)
    teacher = Guided(Denoiser(backend), conds[:1], 1.0)
    config = CacheConfig(count=8, steps=4, guidance=1.0, sizes=((4, 6),), state_sigmas=LEVELS, shard_size=8)
    for _ in cache_latents(teacher, conds, 4, config, folder):
        pass
    return folder


LADD_PAIRS = LADDConfig({"adversarial": 1.0, "pairs": 1.0})


def sd3_run(data: Path, folder: Path | None = None, method: MethodConfig = LADD_PAIRS, rank=2, extra=None, **changes):
    """A run on a tiny SD3, and its description."""
    backend, dataset = DiffusersBackend(build_network("sd3"), FlowProcess()), LatentDataset(data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decode, encoder = torch.nn.ConvTranspose2d(4, 3, 2, 2).requires_grad_(False), ToyEncoder()
    settings = dict(steps=2, batch_size=2, student_lr=1e-2, checkpoint_every=100) | changes
    targets = tuple(name for name in backend.lora_targets() if "attn" in name) if rank else ()
    config = RunConfig(
        method,
        TrainConfig(**settings),
        StudentConfig(rank, targets, "ancestral", {"eta": 0.5}),
        {"base": fingerprint(backend.network), "dataset": dataset.digest(), **(extra or {})},
        DiscriminatorConfig(width=8, blocks=1),
        taps=tuple(backend.default_taps()),
    )
    return new_run(config, Components(backend, decode, encoder), dataset, folder), config


def test_a_new_run_depends_on_its_seed_alone_and_leaves_torch_as_it_was(sd3_data):
    before = torch.get_rng_state()
    first = sd3_run(sd3_data)[0]
    torch.rand(3)
    second, other = sd3_run(sd3_data)[0], sd3_run(sd3_data, seed=1)[0]
    torch.set_rng_state(before)
    sd3_run(sd3_data)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("generator", "discriminator"):
        a, b, c = (
            [p for player in run.players if player.name == name for p in player.parameters.values()]
            for run in (first, second, other)
        )
        assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))


@pytest.mark.case("memory 5.4", "under bfloat16 autocast float16 weights are rounded once, not copied in each use")
@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float16)])
def test_a_float16_base_follows_the_arithmetic(sd3_data, precision, dtype):
    backend, dataset = DiffusersBackend(build_network("sd3").half(), FlowProcess()), LatentDataset(sd3_data)
    config = RunConfig(
        LADDConfig(),
        TrainConfig(precision=precision, batch_size=2),
        StudentConfig(2),
        {"base": "", "dataset": ""},
        DiscriminatorConfig(width=8, blocks=1),
    )
    new_run(config, Components(backend), dataset)
    assert {value.dtype for value in backend.network.parameters()} == {dtype}


def test_the_lora_of_a_run_says_how_it_is_sampled(sd3_data, tmp_path):
    run, config = sd3_run(sd3_data, tmp_path)
    for _ in train(run):
        pass
    state, description = student_of(run, config)
    save_lora(tmp_path / "lora.safetensors", state, description)
    read, said = read_lora(tmp_path / "lora.safetensors")
    assert said["method"] == "LADD + pairs" and said["sigmas"] == list(LEVELS) and said["steps"] == 2
    assert said["sampler"] == "ancestral" and said["sampler_options"] == {"eta": 0.5} and said["cfg"] == 1.0
    assert said["base"] == run.method.student.backend.description()["base"]
    assert all("attn" in name for name in read) and all(name.startswith("transformer.") for name in read)
    with run.ema_weights():
        averaged = run.method.student.lora.export()
    assert read.keys() == averaged.keys() and all(torch.equal(read[name], averaged[name]) for name in read)
    assert not all(torch.equal(averaged[name], value) for name, value in run.method.student.lora.export().items())


@pytest.mark.parametrize(
    ("method", "title", "levels"),
    [
        (ADDConfig(), "ADD", list(LEVELS)),
        (ADDConfig({"adversarial": 1.0, "pairs": 1.0}), "ADD + pairs", list(LEVELS)),
        (Diffusion2GANConfig(critic_rank=2, critic="lora"), "Diffusion2GAN", [1.0]),
        (DMD2Config({"distribution_matching": 1.0, "pairs": 1.0}), "DMD2 + pairs", list(LEVELS)),
    ],
)
def test_every_method_makes_such_a_run(sd3_data, tmp_path, method, title, levels):
    run, config = sd3_run(sd3_data, tmp_path, method)
    for _ in train(run):
        pass
    state, said = student_of(run, config)
    assert said["method"] == title and said["sigmas"] == pytest.approx(levels) and said["steps"] == 2
    assert method.name in said["config"] and method.name in run.settings()
    assert any(value.any() for name, value in state.items() if "lora_B" in name)


def test_full_fine_tuning_writes_differences_that_make_the_student_again(sd3_data, tmp_path):
    """One kind of file for all weights, headless and in the graph: what core's LoRA loaders call .diff."""
    run, config = sd3_run(sd3_data, tmp_path, rank=0, student_lr=1e-3)
    for _ in train(run):
        pass
    state, said = student_of(run, config)
    assert said["weights"] == "differences" and {key.rsplit(".", 1)[1] for key in state} == {"diff", "diff_b"}
    save_lora(tmp_path / "student.safetensors", state, said)
    again = DiffusersBackend(build_network("sd3"), FlowProcess())
    again.add_differences(read_lora(tmp_path / "student.safetensors")[0])
    with run.ema_weights():
        for name, value in run.method.student.backend.network.named_parameters():
            torch.testing.assert_close(again.network.get_parameter(name), value, atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="do not fit the model"):
        again.add_differences({"transformer.nowhere.diff": torch.zeros(1)})
    with pytest.raises(ValueError, match="only a trainable copy"):
        again.export(None)


def test_another_identity_is_another_run(sd3_data, tmp_path):
    """E.g. that of an autoencoder: with another one the run does not go on."""
    for _ in train(sd3_run(sd3_data, tmp_path, extra={"vae": "one"})[0]):
        pass
    with pytest.raises(ValueError, match="other settings .vae is another one now"):
        next(train(sd3_run(sd3_data, tmp_path, extra={"vae": "two"}, steps=3)[0]))


def test_another_student_is_another_run(sd3_data, tmp_path):
    for _ in train(sd3_run(sd3_data, tmp_path)[0]):
        pass
    run, _ = sd3_run(sd3_data, tmp_path, steps=3)
    run.description["student"]["sampler"] = "euler"
    with pytest.raises(ValueError, match="other settings .student.sampler is euler now, was "):
        next(train(run))


def test_a_checkpoint_of_version_0_1_is_refused_with_a_sentence(sd3_data, tmp_path):
    """Such a checkpoint states no format: its random draws were others."""
    for _ in train(sd3_run(sd3_data, tmp_path)[0]):
        pass
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = load_tensors(path)
    state = json.loads(metadata["run"])
    del state["format"]
    save_tensors(path, tensors, {"run": json.dumps(state)})
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="written by another version of Turbo Distill.*choose another output folder"):
        next(train(sd3_run(sd3_data, tmp_path, steps=3)[0]))
    assert path.read_bytes() == kept


# Everything that decides a run is in its description


def changed(value):
    """Another value of a setting's kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, *value) or ("x",)
    if isinstance(value, dict):
        return {**value, "x": 1.0}
    return "x"


def with_field(config, name: str, value):
    """A copy of a frozen config with one field changed, whether or not the value makes sense."""
    copied = copy.copy(config)
    object.__setattr__(copied, name, value)
    return copied


def variants(section):
    """(name, copy with that setting changed) of all settings, also of a section inside. A LoRA to start from and an
    adapter are files whose digests are described (test_student.py)."""
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            for name, changed_value in variants(value):
                yield f"{f.name}.{name}", with_field(section, f.name, changed_value)
        elif f.name not in ("start_from", "adapter"):
            yield f.name, with_field(section, f.name, changed(value))


@pytest.mark.parametrize("method", [method() for method in METHODS.values()], ids=list(METHODS))
def test_every_setting_that_decides_a_run_changes_its_description(method):
    """Found by walking the dataclasses: a new setting is in the description, or says that it decides nothing."""
    base = RunConfig(method, TrainConfig(), StudentConfig(), {"base": "a", "dataset": "b"})
    unread = {"discriminator", "vision"} - set(method.sections)
    silent = set()
    for part in fields(RunConfig):
        section = getattr(base, part.name)
        if not is_dataclass(section):
            other = with_field(base, part.name, changed(section))
            assert other.request() != base.request(), part.name
            continue
        for name, changed_section in variants(section):
            other = with_field(base, part.name, changed_section)
            if {**other.request(), "steps": 0} == {**base.request(), "steps": 0}:
                silent.add(f"{part.name}.{name}")
    assert {name for name in silent if name.split(".")[0] in unread} == {
        f"{name}.{f.name}" for name in unread for f in fields(getattr(base, name))
    }
    silent = {name for name in silent if name.split(".")[0] not in unread}
    asked = {"train.keep_at_least"}  # decides no step, and yet where a run ends
    assert silent == {f"train.{s.name}" for s in settings_of(TrainConfig) if not s.decides} - asked


# What is saved is what the files say

LOST = {"diversity": 0.0, "spread": 0.0, "logit_gap": 9.0, "logit_spread": 1.0}


def lose_from(monkeypatch, first: int, last: int = 10**9) -> None:
    """Steps from ``first`` to ``last`` log outputs that are all alike, and heads that are sure of them."""
    honest = loop.training_step

    def step(run):
        return honest(run) | (LOST if first <= run.step < last else {})

    monkeypatch.setattr(loop, "training_step", step)
    monkeypatch.setattr("distill_core.training.run.Health", lambda: Health(window=5, patience=10))


def steps_in_files(folder: Path) -> dict[str, int]:
    """The step that each file of a run claims."""
    saved = json.loads(load_tensors(folder / "checkpoint.safetensors")[1]["run"])
    claims = {"log": RunFolder(folder).logs()[-1]["step"], "checkpoint": saved["step"]}
    if (folder / "student.safetensors").exists():
        claims["lora"] = read_lora(folder / "student.safetensors")[1]["steps"]
    return claims


@pytest.mark.case("training D2", "after an early end log, checkpoint and LoRA are of the step whose weights are kept")
@pytest.mark.parametrize("every", [1, 7, 100])
def test_after_an_early_end_all_files_are_of_one_step(dataset, tmp_path, monkeypatch, every):
    with monkeypatch.context() as patch:
        lose_from(patch, 20)
        with pytest.raises(Collapse, match="weights of step 20 are kept"):
            train_toy(dataset, tmp_path / "a", steps=60, checkpoint_every=every)
    assert steps_in_files(tmp_path / "a") == {"log": 20, "checkpoint": 20, "lora": 20}
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path / "b", [stop_at(20)], steps=60)
    ended, stopped = (load_tensors(tmp_path / name / "student.safetensors")[0] for name in "ab")
    assert all(torch.equal(ended[name], stopped[name]) for name in stopped)
    train_toy(dataset, tmp_path / "a", steps=60, checkpoint_every=every)
    assert [entry["step"] for entry in RunFolder(tmp_path / "a").logs()] == list(range(1, 61))
    assert steps_in_files(tmp_path / "a") == {"log": 60, "checkpoint": 60, "lora": 60}


@pytest.mark.case("training 3", "no file of an ended run holds weights that were not trained")
@pytest.mark.case("training D2", "a run that had no good step writes no LoRA")
def test_a_run_without_a_good_step_writes_no_lora(dataset, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    lose_from(monkeypatch, 0)
    with pytest.raises(Collapse, match="No step before it can be kept"):
        train_toy(dataset, tmp_path, steps=60, checkpoint_every=3)
    assert not (tmp_path / "student.safetensors").exists() and folder.logs() == [] and not folder.report.exists()
    assert json.loads(load_tensors(tmp_path / "checkpoint.safetensors")[1]["run"])["step"] == 0


def test_whether_a_run_is_lost_does_not_depend_on_where_it_was_stopped(dataset, tmp_path, monkeypatch):
    """The steps before a stop count: it ends at the same step, with the same weights."""
    lose_from(monkeypatch, 20)
    texts = []
    for name, stops in (("a", [stop_at(27)]), ("b", [])):
        for stop in stops:
            with pytest.raises(StoppedHere):
                train_toy(dataset, tmp_path / name, [stop], steps=60, checkpoint_every=7)
        with pytest.raises(Collapse) as caught:
            train_toy(dataset, tmp_path / name, steps=60, checkpoint_every=7)
        texts.append(str(caught.value).split(". ")[0])
    assert texts[0] == texts[1] and "10 steps in a row" in texts[0]


@pytest.mark.case("training D1b", "stop_when_lost = false trains on to the end")
def test_the_end_can_be_switched_off(dataset, tmp_path, monkeypatch):
    lose_from(monkeypatch, 5)
    train_toy(dataset, tmp_path, steps=60, stop_when_lost=False)
    assert steps_in_files(tmp_path) == {"log": 60, "checkpoint": 60, "lora": 60}
