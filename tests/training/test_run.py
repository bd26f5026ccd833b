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
from distill_core.files import fingerprint, load_tensors, read_lora, save_lora, save_tensors
from distill_core.methods.add import ADDConfig
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.config import MethodConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import METHODS
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.settings import settings_of
from distill_core.training.loop import TrainConfig, train
from distill_core.training.run import (
    RunConfig,
    RunFolder,
    StudentConfig,
    folder_in,
    new_run,
    pick_targets,
    student_of,
    train_to_end,
)


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
        "x" * 101,
        "a\nb",
    ],
)
def test_a_name_that_could_lead_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a folder inside"):
        folder_in(tmp_path, name)


def test_a_link_out_of_the_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="cannot be a folder inside"):
        folder_in(tmp_path / "root", "link")


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


def test_the_log_has_every_step_once_also_after_a_crash(dataset, tmp_path):
    """A run is stopped at step 4, then its log claims two steps that its checkpoint does not know, one cut off."""
    folder = RunFolder(tmp_path)
    with pytest.raises(StoppedHere):
        train_toy(dataset, tmp_path, [stop_at(4)])
    with open(folder.log, "a") as log:
        log.write(json.dumps({"step": 5, "adversarial": 123.0}) + '\n{"step": 6, "adver')
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
    with pytest.raises(ValueError, match="no layer's name contains conv; names look like blocks.0.attn.q"):
        pick_targets(names, ["attn", "conv"])


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
    with pytest.raises(ValueError, match="other settings .vae."):
        next(train(sd3_run(sd3_data, tmp_path, extra={"vae": "two"}, steps=3)[0]))


def test_another_student_is_another_run(sd3_data, tmp_path):
    for _ in train(sd3_run(sd3_data, tmp_path)[0]):
        pass
    run, _ = sd3_run(sd3_data, tmp_path, steps=3)
    run.description["student"]["sampler"] = "euler"
    with pytest.raises(ValueError, match="other settings .student.sampler."):
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
        for f in fields(section):
            other = with_field(base, part.name, with_field(section, f.name, changed(getattr(section, f.name))))
            if {**other.request(), "steps": 0} == {**base.request(), "steps": 0}:
                silent.add(f"{part.name}.{f.name}")
    assert {name for name in silent if name.split(".")[0] in unread} == {
        f"{name}.{f.name}" for name in unread for f in fields(getattr(base, name))
    }
    silent = {name for name in silent if name.split(".")[0] not in unread}
    assert silent == {f"train.{s.name}" for s in settings_of(TrainConfig) if not s.decides}
    assert silent == {"train.steps", "train.checkpoint_every"}
