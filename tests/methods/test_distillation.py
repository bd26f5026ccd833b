"""The distillation term in latents: its gradient, its guidance, who learns from it, and what older runs say of it."""

from dataclasses import replace

import pytest
import torch
from toy import CHANNELS, LEVELS, cache_toy, toy_conds, toy_method, toy_parts, toy_run

from distill_core.data.dataset import Batch, LatentDataset
from distill_core.data.real import save_latents
from distill_core.diffusion.noise import ItemNoise
from distill_core.methods.add import ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.distillation import Distilling
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.tune import TuneConfig
from distill_core.settings import decisive
from distill_core.training.config import load_config
from distill_core.training.loop import train

ALONE = {"distillation": 1.0}
IN_LATENTS = {
    "ladd": LADDConfig(ALONE),
    "add": ADDConfig(ALONE, space="latent"),
    "diffusion2gan": Diffusion2GANConfig(ALONE),
    "tune": TuneConfig(ALONE, student_sigmas=LEVELS),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Real latents with their captions, as `cache --images` stores them: no states, guidance 1."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(1)
    conds, empty = toy_conds()
    latents = [torch.randn(CHANNELS, 4, 6, generator=generator) for _ in range(12)]
    save_latents(latents, [conds[[i % 3]] for i in range(12)], empty, folder)
    return LatentDataset(folder)


def in_float64(dataset, config, **changes):
    """A method and its step in float64, the student's result a leaf of its own."""
    method = toy_method(dataset, replace(config, **changes))
    method.teacher.backend.network.double()
    method.guided_teacher.uncond = method.guided_teacher.uncond.to(dtype=torch.float64)
    batch = dataset.batch(0, 6, 0)
    batch = Batch(batch.latents.double(), batch.cond.to(dtype=torch.float64))
    step = method.start(batch, ItemNoise(3, range(6)), 0)
    step.fake = step.fake.detach().double().requires_grad_()
    return method, step


@pytest.mark.parametrize("config", IN_LATENTS.values(), ids=IN_LATENTS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gradient_is_that_of_the_formula(dataset, config, scale):
    """2 (1 - t) (x - x_T) / (items values), x_T the guided teacher's answer to (1 - t) x + t noise."""
    method, step = in_float64(dataset, config)
    method.guided_teacher.scale = scale
    (gradient,) = torch.autograd.grad(method.distillation_term(step), step.fake)
    t = step.teacher_time.double()
    time = t.view(-1, 1, 1, 1)
    assert ((t > 0.02) & (t < 0.98)).all() and len(t.unique()) == 6
    x = step.fake.detach()
    noised = (1 - time) * x + time * ItemNoise(3, range(6)).named("teacher noise").normal_like(x)
    with_text = method.teacher(noised, t, step.batch.cond)
    rows = method.guided_teacher.uncond.map(lambda value: value.expand(6, *value.shape[1:]))
    without = method.teacher(noised, t, rows)
    target = without + scale * (with_text - without)
    expected = 2 * (1 - time) * (x - target) / x.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
    assert expected.abs().max() > 1e-4


def test_guidance_of_the_run_is_that_of_the_target(dataset):
    targets = {}
    for scale in (1.0, 2.0):
        method, step = in_float64(dataset, IN_LATENTS["ladd"])
        method.guided_teacher.scale = scale
        targets[scale] = step.teacher_answer
    assert (targets[1.0] - targets[2.0]).abs().max() > 1e-2


@pytest.mark.parametrize("config", IN_LATENTS.values(), ids=IN_LATENTS)
def test_it_trains_the_student_and_nothing_of_the_teacher(dataset, config):
    method = toy_method(dataset, config)
    batch = dataset.batch(0, 8, 0)
    batch = Batch(batch.latents, batch.cond)
    step = method.start(batch, ItemNoise(0, range(8)), 0)
    loss, logs = method.generator_loss(step)
    assert loss.item() == logs["distillation"].item() > 0 and not step.teacher_answer.requires_grad
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.student.lora.parameters())
    assert all(p.grad is None for p in method.teacher.backend.network.parameters())


def test_ladd_needs_no_decoder_and_learns_from_pictures(pictures):
    """Both terms count, and guidance of the teacher is a setting beside the dataset's own, which is 1."""
    config = LADDConfig({"adversarial": 1.0, "distillation": 2.5})
    parts = toy_parts()
    method = toy_method(pictures, config, parts=replace(parts, decode=None, encoder=None))
    assert isinstance(method, Distilling) and pictures.manifest()["guidance"] == 1.0
    logs = [event.logs for event in train(toy_run(pictures, ladd=config, steps=4))]
    assert {"adversarial", "distillation", "discriminator"} <= logs[-1].keys()
    assert all(entry["distillation"] > 0 for entry in logs)


def test_alone_it_brings_the_student_to_the_teachers_answers(dataset):
    """On a small model the distance falls: there is nothing that plays against it."""
    run = toy_run(dataset, ladd=LADDConfig(ALONE, weighting="sds"), steps=60, discriminator_lr=0.0)
    logs = [event.logs["distillation"] for event in train(run)]
    assert sum(logs[-10:]) < 0.9 * sum(logs[:10])


def test_terms_of_a_turbo_take_it_for_own_items_only(dataset, pictures):
    config = TuneConfig({"distillation": 1.0, "keep": 1.0}, student_sigmas=LEVELS)
    method = toy_method(dataset, config)
    assert method.active(pictures.batch(0, 4, 0)) == ["distillation"]
    assert method.active(dataset.batch(0, 4, 0)) == ["keep"]


def test_guidance_without_the_empty_conditioning_is_refused(dataset):
    method = toy_method(dataset, LADDConfig(ALONE))
    for changes in ({"guidance": 2.0}, {"config": LADDConfig(ALONE, weighting="nfsd")}):
        given = {"taps": [], "config": LADDConfig(ALONE), **changes}
        with pytest.raises(ValueError, match="uncond"):
            type(method)(method.student, method.teacher, None, **given)


def test_what_runs_say_is_what_they_said(tmp_path):
    """ADD has always named the term's settings, the others name them where they differ."""
    always = {"weighting", "reduction", "teacher_steps", "time_range", "nfsd_scale"}
    assert always <= decisive(ADDConfig()).keys() and "nfsd_negative" not in decisive(ADDConfig())
    for config in (LADDConfig, Diffusion2GANConfig, TuneConfig):
        assert not always & decisive(config()).keys()
        assert decisive(config(weighting="sds"))["weighting"] == "sds"


def test_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[ladd]\nterms = { adversarial = 1.0, distillation = 2.5 }\nteacher_steps = 2\n[teacher]\nguidance = 4.5\n"
    )
    config = load_config(path)
    assert config.method_config.weight("distillation") == 2.5 and config.method_config.teacher_steps == 2
    assert config.teacher.guidance == 4.5 and config.method_config.title_with_terms() == "LADD + distillation"
