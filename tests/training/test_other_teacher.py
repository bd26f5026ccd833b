"""Another teacher than the model itself: a LoRA on the shared backbone, or a network of another width."""

from dataclasses import replace

import pytest
import torch
from networks import LATENT, build_cond, build_network, randomise_path
from torch._subclasses.fake_tensor import FakeTensorMode

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import FlowProcess
from distill_core.files import load_tensors, save_tensors
from distill_core.lora_files import read_lora
from distill_core.methods.components import Components
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.tune import TuneConfig
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.pipelines import ModelConfig
from distill_core.models.teachers import Teacher, TeacherConfig, open_teacher
from distill_core.training.changes import OtherSettings
from distill_core.training.ledger import without_data
from distill_core.training.loop import TrainConfig
from distill_core.training.other_teacher import teacher_notes
from distill_core.training.plan import Shapes, plan_step
from distill_core.training.preflight import taught
from distill_core.training.run import RunConfig, StudentConfig, new_run, student_of, train_to_end
from distill_core.training.run_folder import RunFolder

WIDE = {"num_attention_heads": 3, "caption_projection_dim": 96}
BOTH = LADDConfig({"adversarial": 1.0, "distillation": 2.5}, warmup_steps=0)


class Source:
    """What `open_teacher` asks of an opened model."""

    device = "cpu"

    def __init__(self, backend) -> None:
        self.backend = backend


def small() -> DiffusersBackend:
    return DiffusersBackend(build_network("sd3"), FlowProcess())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Samples of the small model."""
    folder, backend = tmp_path_factory.mktemp("data"), small()
    settings = CacheConfig(count=8, steps=4, guidance=2.0, sizes=(LATENT[1:],), state_sigmas=(1.0,), batch_size=8)
    for _ in cache_latents(
        Guided(Denoiser(backend), build_cond(1, 9), 2.0), build_cond(4), 4, settings, folder, {"base": backend.digest()}
    ):
        pass
    return LatentDataset(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A wider network as a folder, and LoRAs for the small and the wide one."""
    root = tmp_path_factory.mktemp("teachers")
    wide = build_network("sd3", seed=1, **WIDE)
    wide.save_pretrained(root / "wide")
    for name, backend in (("tuned", small()), ("wide_tuned", DiffusersBackend(wide))):
        lora = randomise_path(backend.new_lora(3), seed=4)
        save_tensors(root / f"{name}.safetensors", lora.export(), {})
    return root


def opened(backend, **teacher) -> Teacher:
    found = open_teacher(TeacherConfig(**{k: str(v) for k, v in teacher.items()}), ModelConfig(), Source(backend))
    assert found is not None
    return found


def described(components, dataset, method=BOTH, rank=2, **train) -> RunConfig:
    settings = TrainConfig(**{"batch_size": 4, "steps": 4, "student_lr": 1e-3, "checkpoint_every": 2, **train})
    teacher = components.teacher
    identities = {"base": components.backend.digest(), "dataset": dataset.digest()}
    identities |= {"teacher": teacher.digest} if teacher else {}
    return RunConfig(method, settings, StudentConfig(rank), identities)


def run_with(dataset, folder=None, method=BOTH, rank=2, teacher=None, **train):
    """A run of the small model; teacher: fields of `TeacherConfig`."""
    backend = small()
    components = Components(backend, teacher=opened(backend, **teacher) if teacher else None)
    config = described(components, dataset, method, rank, **train)
    return new_run(config, components, dataset, folder), config, components


def target(run, dataset):
    """The teacher's answer to the same noised results, whatever the student is."""
    method, batch = run.method, dataset.batch(0, 4, 0)
    step = method.start(batch, ItemNoise(1, range(4)), 0)
    step.fake = batch.latents
    return step.teacher_answer


# What teaches


def test_a_lora_on_the_shared_backbone_gives_other_targets_and_heads(dataset, files):
    """One network; the student begins as the model without it."""
    plain, _, _ = run_with(dataset)
    tuned, _, components = run_with(dataset, teacher={"lora": files / "tuned.safetensors"})
    method = tuned.method
    assert method.teacher.backend is method.student.backend and components.backends == [components.backend]
    assert (target(plain, dataset) - target(tuned, dataset)).abs().max() > 1e-2
    batch = dataset.batch(0, 4, 0)
    x, sigma = batch.latents, torch.full((4,), 0.5)
    own = Denoiser(components.backend)(x, sigma, batch.cond)
    assert torch.equal(method.student(x, sigma, batch.cond), own)
    assert not torch.allclose(method.teacher(x, sigma, batch.cond), own, atol=1e-2)
    # as if the LoRA were in the weights
    merged = small()
    method.teacher.lora.put_into(merged.network)
    torch.testing.assert_close(method.teacher(x, sigma, batch.cond), Denoiser(merged)(x, sigma, batch.cond))
    maps = [view.features(x, sigma, batch.cond, method.taps) for view in (method.teacher, Denoiser(merged))]
    torch.testing.assert_close(*maps)


def test_a_wider_network_is_read_by_the_heads(dataset, files):
    run, _, components = run_with(dataset, teacher={"path": files / "wide"})
    teacher = run.method.teacher.backend
    assert teacher is not components.backend and components.backends == [components.backend, teacher]
    batch = dataset.batch(0, 2, 0)
    maps = run.method.teacher.features(batch.latents, torch.full((2,), 0.5), batch.cond, run.method.taps)
    assert maps[0].shape[1] == 96 and run.method.student.backend.network.config.num_attention_heads == 2
    assert [name for name, _ in taught(run)] == ["model", "teacher"]
    assert [name for name, _ in taught(run_with(dataset)[0])] == ["teacher"]


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "all weights"])
@pytest.mark.parametrize("which", ["lora", "path", "both"])
def test_students_learn_and_teachers_stay(dataset, files, rank, which, tmp_path):
    """A step moves the student; neither the frozen networks nor the teacher's LoRA."""
    teacher = {"lora": {"lora": files / "tuned.safetensors"}, "path": {"path": files / "wide"}}.get(which)
    teacher = teacher or {"path": files / "wide", "lora": files / "wide_tuned.safetensors"}
    run, config, components = run_with(dataset, tmp_path, rank=rank, teacher=teacher, steps=1)
    frozen = [p for backend in components.backends for p in backend.network.parameters()]
    frozen += list(run.method.teacher.lora.parameters()) if run.method.teacher.lora else []
    before = [p.clone() for p in frozen]
    start = [p.clone() for p in run.student_parameters.values()]
    train_to_end(run, config, RunFolder(tmp_path), tmp_path / "student.safetensors")
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, frozen, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, run.student_parameters.values(), strict=True))
    _, description = read_lora(tmp_path / "student.safetensors")
    assert description["teacher"] == components.teacher.name and description["base"] == small().digest()
    assert description["config"]["teacher"] == components.teacher.digest


@pytest.mark.parametrize("critic", ["lora", "copy"])
def test_a_trained_discriminator_begins_as_the_teacher(dataset, files, critic):
    for teacher in ({"lora": files / "tuned.safetensors"}, {"path": files / "wide"}):
        method = Diffusion2GANConfig({"adversarial": 1.0}, critic=critic, critic_rank=2)
        run, _, _ = run_with(dataset, method=method, teacher=teacher)
        assert_equal_views(run.method.discriminator.backbone, run.method.teacher, dataset)


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "all weights"])
def test_a_fake_score_begins_as_the_teacher(dataset, files, rank):
    for teacher in ({"lora": files / "tuned.safetensors"}, {"path": files / "wide"}):
        run, _, _ = run_with(dataset, method=DMD2Config(), rank=rank, teacher=teacher)
        assert_equal_views(run.method.fake_score, run.method.teacher, dataset)


def assert_equal_views(one, other, dataset):
    batch = dataset.batch(0, 4, 0)
    answers = [view(batch.latents, torch.full((4,), 0.6), batch.cond) for view in (one, other)]
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


# The same run


@pytest.mark.parametrize("which", ["lora", "path"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(dataset, files, tmp_path, which):
    teacher = {"lora": files / "tuned.safetensors"} if which == "lora" else {"path": files / "wide"}
    for folder, lengths in ((tmp_path / "whole", [4]), (tmp_path / "parts", [2, 4])):
        for steps in lengths:
            run, config, _ = run_with(dataset, folder, teacher=teacher)
            config = replace(config, train=replace(config.train, steps=4))

            class Enough(Exception):
                pass

            def stop(event, condition, steps=steps, enough=Enough):
                if event.step == steps < 4:
                    raise enough

            try:
                train_to_end(run, config, RunFolder(folder), folder / "student.safetensors", [stop])
            except Enough:
                assert steps == 2
    (a, _), (b, _) = (load_tensors(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_does_not_go_on_with_another_teacher(dataset, files, tmp_path):
    run, config, _ = run_with(dataset, tmp_path, teacher={"path": files / "wide"}, steps=2)
    train_to_end(run, config, RunFolder(tmp_path), tmp_path / "student.safetensors")
    for teacher in (None, {"lora": files / "tuned.safetensors"}):
        run, _, _ = run_with(dataset, tmp_path, teacher=teacher, steps=3)
        with pytest.raises(OtherSettings) as caught:
            run.resume()
        assert set(caught.value.changes) == {"teacher"} and "teacher" in str(caught.value)


def test_a_run_without_one_is_described_as_before(dataset):
    run, config, _ = run_with(dataset)
    assert "teacher" not in config.description() and "teacher" not in student_of(run, config)[1]


# Refusals, before the first step


def refused(dataset, files, match, teacher, method=BOTH, **network):
    backend = small()
    other = DiffusersBackend(build_network(teacher, **network)) if isinstance(teacher, str) else teacher
    components = Components(backend, teacher=Teacher(Denoiser(other, name="the other"), "x"))
    with pytest.raises(ValueError, match=match):
        new_run(described(components, dataset, method), components, dataset)


def test_teachers_that_cannot_teach_are_refused(dataset, files):
    refused(
        dataset,
        files,
        "the other takes latents of 6 channels, the model latents of 4",
        "sd3",
        in_channels=6,
        out_channels=6,
    )
    refused(dataset, files, "text tokens of width 48, the model .* 32", "sd3", joint_attention_dim=48)
    refused(dataset, files, "a pooled text of width 8, the model .* 16", "sd3", pooled_projection_dim=8)
    refused(dataset, files, r"another noise process .*\(discrete, flow\)", "unet")
    refused(dataset, files, "the teacher the other cannot compute an item", "sd3", pos_embed_max_size=2)
    tune = TuneConfig({"denoising": 1.0}, student_sigmas=(1.0,))
    refused(dataset, files, "its own teacher", "sd3", method=tune)


def test_files_that_do_not_fit_are_named(files):
    with pytest.raises(ValueError, match=r"\[teacher\] path: .* is not a folder"):
        opened(small(), path=files / "nowhere")
    with pytest.raises(ValueError, match=r"\[teacher\] lora: wide_tuned.safetensors is a LoRA of another model"):
        opened(small(), lora=files / "wide_tuned.safetensors")


# The dataset


def test_a_dataset_of_another_model_is_a_warning(dataset, files):
    run, _, components = run_with(dataset, method=LADDConfig({"pairs": 1.0}), teacher={"path": files / "wide"})
    (note,) = teacher_notes(components, dataset)
    assert "made by another model" in note and "wide" in note and components.teacher.digest in note
    assert teacher_notes(Components(components.backend), dataset) == [] and run.method.config.weight("pairs")


def test_pairs_are_tried_with_who_made_them(dataset, files):
    """Those of the model by the model, though another one teaches."""
    method = Diffusion2GANConfig({"pairs": 1.0})
    run_with(dataset, method=method, teacher={"lora": files / "tuned.safetensors"})
    backend = small()
    teacher = replace(opened(backend, lora=files / "tuned.safetensors"), digest=backend.digest())
    components = Components(backend, teacher=teacher)  # it claims to have made them
    with pytest.raises(ValueError, match="does not lead to the stored latent"):
        new_run(described(components, dataset, method), components, dataset)


# Memory


def test_the_plan_counts_the_second_network(dataset, files):
    sizes = {}
    for which in ("none", "wide", "lora"):

        def make(mode: FakeTensorMode, which=which) -> Components:
            backend = DiffusersBackend(without_data(build_network("sd3"), mode), FlowProcess())
            if which == "none":
                return Components(backend)
            other, lora = backend, None
            if which == "wide":
                other = DiffusersBackend(without_data(build_network("sd3", **WIDE), mode), FlowProcess())
            else:
                with mode:
                    lora = backend.new_lora(3).requires_grad_(False)
            return Components(backend, teacher=Teacher(Denoiser(other, lora, name=which), ""))

        config = RunConfig(BOTH, TrainConfig(batch_size=4), StudentConfig(2), {"base": "", "dataset": ""})
        plan = plan_step(config, make, Shapes(LATENT, build_cond(1), (), 2.0), card=False)
        sizes[which] = plan.parts["model"]
    wide = sum(p.numel() for p in build_network("sd3", **WIDE).parameters()) * 4
    lora = sum(p.numel() for p in small().new_lora(3).parameters()) * 4
    assert sizes["wide"] - sizes["none"] == pytest.approx(wide, rel=0.02)
    assert sizes["lora"] - sizes["none"] == pytest.approx(lora, rel=0.02)
