import json
from pathlib import Path

import pytest
import torch
from networks import build_cond, build_network
from toy import LEVELS, ToyEncoder, cache_toy, toy_run

from distill_core.data.dataset import CacheConfig, LatentDataset, cache_latents
from distill_core.diffusion.process import FlowProcess
from distill_core.files import read_lora, save_lora
from distill_core.methods.add import ADDConfig
from distill_core.methods.base import MethodConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import Components, DiscriminatorConfig, name_of
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.training.loop import TrainConfig, train
from distill_core.training.run import RunFolder, StudentConfig, folder_in, new_run, pick_targets, student_of


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


def test_the_log_has_every_step_once_also_after_a_crash(dataset, tmp_path):
    """A run is stopped at step 4, then its log claims two steps that its checkpoint does not know, one cut off."""
    folder = RunFolder(tmp_path)
    events = folder.follow(toy_run(dataset, tmp_path))
    for event, _ in events:
        if event.step == 4:
            break
    events.close()
    with open(folder.log, "a") as log:
        log.write(json.dumps({"step": 5, "adversarial": 123.0}) + '\n{"step": 6, "adver')
    assert [entry["step"] for entry in folder.logs()] == [1, 2, 3, 4, 5]
    resumed = [event.step for event, _ in folder.follow(toy_run(dataset, tmp_path))]
    assert resumed == [5, 6]
    logs = folder.logs()
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6] and logs[4]["adversarial"] != 123.0
    whole = [event.logs for event in train(toy_run(dataset))]
    assert [entry | {"step": 0} for entry in logs] == [entry | {"step": 0} for entry in whole]


def test_closing_writes_the_checkpoint_at_once(dataset, tmp_path):
    events = RunFolder(tmp_path).follow(toy_run(dataset, tmp_path))
    next(events)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    events.close()
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_the_condition_is_that_of_the_last_step(dataset, tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.condition() is None
    words = [condition for _, condition in folder.follow(toy_run(dataset, tmp_path, steps=25))]
    assert folder.condition() == words[-1] and words[0].word == "starting" and words[-1].word != "starting"


def test_a_report_answers_only_what_was_asked(tmp_path):
    folder, asked = RunFolder(tmp_path), {"steps": 5, "levels": (1.0, 0.5)}
    assert folder.finished(asked) is None
    folder.finish(asked, word="healthy")
    assert folder.finished(asked)["word"] == "healthy"
    assert folder.finished({**asked, "steps": 6}) is None
    folder.report.write_text("{")
    assert folder.finished(asked) is None
    with pytest.raises(ValueError, match="there is no run in"):
        folder.started()


def test_targets_by_parts_of_their_names():
    names = ["blocks.0.attn.q", "blocks.0.mlp", "blocks.1.attn.q"]
    assert pick_targets(names, "") == tuple(names)
    assert pick_targets(names, " attn ,") == ("blocks.0.attn.q", "blocks.1.attn.q")
    assert pick_targets(names, "mlp,blocks.1") == ("blocks.0.mlp", "blocks.1.attn.q")
    with pytest.raises(ValueError, match="no layer's name contains conv; names look like blocks.0.attn.q"):
        pick_targets(names, "conv")


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


def sd3_run(data: Path, folder: Path | None = None, method: MethodConfig = LADD_PAIRS, beside=None, **changes):
    backend = DiffusersBackend(build_network("sd3"), FlowProcess())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decode, encoder = torch.nn.ConvTranspose2d(4, 3, 2, 2).requires_grad_(False), ToyEncoder()
    settings = dict(steps=2, batch_size=2, student_lr=1e-2, checkpoint_every=100) | changes
    student = StudentConfig(
        2, tuple(name for name in backend.lora_targets() if "attn" in name), "ancestral", {"eta": 0.5}
    )
    run = new_run(
        Components(backend, decode, encoder),
        LatentDataset(data),
        method,
        TrainConfig(**settings),
        student,
        backend.default_taps(),
        folder,
        DiscriminatorConfig(width=8, blocks=1),
        beside=beside,
    )
    return run, student


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
            [p for phase in run.phases if phase.name == name for p in phase.parameters.values()]
            for run in (first, second, other)
        )
        assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))


def test_the_lora_of_a_run_says_how_it_is_sampled(sd3_data, tmp_path):
    run, student = sd3_run(sd3_data, tmp_path)
    for _ in train(run):
        pass
    state, description = student_of(run, student)
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
    run, student = sd3_run(sd3_data, tmp_path, method)
    for _ in train(run):
        pass
    state, said = student_of(run, student)
    assert said["method"] == title and said["sigmas"] == pytest.approx(levels) and said["steps"] == 2
    assert name_of(method) in said["config"] and name_of(method) in run.settings()
    assert any(value.any() for name, value in state.items() if "lora_B" in name)


def test_what_lies_beside_the_model_is_part_of_the_run(sd3_data, tmp_path):
    """E.g. the identity of an autoencoder: with another one the run does not go on."""
    for _ in train(sd3_run(sd3_data, tmp_path, beside={"vae": "one"})[0]):
        pass
    with pytest.raises(ValueError, match="other settings .vae."):
        next(train(sd3_run(sd3_data, tmp_path, beside={"vae": "two"}, steps=3)[0]))


def test_another_student_is_another_run(sd3_data, tmp_path):
    for _ in train(sd3_run(sd3_data, tmp_path)[0]):
        pass
    run, _ = sd3_run(sd3_data, tmp_path, steps=3)
    run.description["student"]["sampler"] = "euler"
    with pytest.raises(ValueError, match="other settings .student."):
        next(train(run))
