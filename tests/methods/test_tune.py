"""Tuning a turbo: which term counts on which items, and each term's target."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import CHANNELS, LEVELS, ToyBackend, cache_toy, toy_conds, toy_method, toy_run

from distill_core.data.cache import cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.data.kept import cache_kept, kept_config
from distill_core.data.mix import new_mix, open_data
from distill_core.data.real import save_latents
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, cumulative_alphas
from distill_core.diffusion.samplers import SAMPLERS
from distill_core.diffusion.schedules import explicit_sigmas, grid_sigmas
from distill_core.files import load_tensors
from distill_core.methods.base import StudentMethod
from distill_core.methods.tune import TuneConfig
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.training.loop import train, training_step
from distill_core.training.preflight import gradient_faults

OWN_TERMS = ("adversarial", "denoising", "reconstruction", "consistency", "agreement")
EVERY = dict.fromkeys((*OWN_TERMS, "keep"), 1.0)


def cache_both(folder, levels=LEVELS):
    """Own latents, and kept ones of the toy model as a turbo."""
    cond, empty = toy_conds()
    g = torch.Generator().manual_seed(8)
    latents = [torch.randn(CHANNELS, 4, 6, generator=g) for _ in range(16)]
    save_latents(latents, [cond[[i % 3]] for i in range(16)], empty, folder / "own")
    turbo, config = Guided(Denoiser(ToyBackend()), empty, 1.0), kept_config(levels, 8, (4, 6), batch_size=4)
    for _ in cache_kept(turbo, cond, CHANNELS, config, folder / "kept", sampler="renoise"):
        pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cache_both(folder)
    return folder


@pytest.fixture
def mix(folders):
    return open_data(new_mix({folders / "own": 0.5, folders / "kept": 0.5}))


def started(mix, kept: bool, size: int = 16, **config):
    """(method, step) on a batch of one kind."""
    method = toy_method(mix, TuneConfig(**config))
    number = next(n for n in range(9) if (mix.batch(n, 2, 0).states is not None) == kept)
    return method, method.start(mix.batch(number, size, 0), ItemNoise(3, range(size)), 0)


@pytest.mark.parametrize("kept", [False, True], ids=["own", "kept"])
@pytest.mark.parametrize("adversarial_on", ["own", "both"])
def test_each_term_counts_on_its_kind_of_items(mix, kept, adversarial_on):
    method, step = started(mix, kept, terms=EVERY, adversarial_on=adversarial_on)
    expected = {"keep", "agreement", *(["adversarial"] if adversarial_on == "both" else [])} if kept else {*OWN_TERMS}
    assert set(method.active(step.batch)) == expected
    _, logs = method.generator_loss(step)
    assert set(logs) & set(EVERY) == expected
    assert (method.judge(step) is None) == ("adversarial" not in expected)
    for name in expected:
        value = method.terms()[name](step)
        assert torch.autograd.grad(value, step.fake, retain_graph=True)[0].any(), name


def test_kept_items_are_states_that_the_turbo_visits(mix):
    method, step = started(mix, True, terms={"keep": 1.0}, regression="mse")
    assert step.on_path.all() and not step.denoises.any()
    for row, sigma in enumerate(step.sigma.tolist()):
        assert torch.equal(step.x[row], step.batch.states[row, LEVELS.index(sigma)])
    expected = (step.fake - method.teacher(step.x, step.sigma, step.batch.cond)).square().mean()
    torch.testing.assert_close(method.keep_term(step), expected)
    plain = StudentMethod.probabilities(method, 0, step.batch)
    assert method.probabilities(0, step.batch) == plain == (1.0,) * 4


def test_an_untrained_student_keeps_everything(mix):
    method, step = started(mix, True, terms={"keep": 1.0})
    with torch.no_grad():
        for up in method.student.lora.up:
            up.zero_()
    step = method.start(step.batch, ItemNoise(3, range(16)), 0)
    assert method.keep_term(step).item() == 0.0


@pytest.mark.parametrize("below, levels", [(0.8, (0.75, 0.5, 0.25)), (0.5, (0.5, 0.25)), (1.0, LEVELS)])
def test_reconstruction_counts_up_to_its_level(mix, below, levels):
    method, step = started(mix, False, terms={"reconstruction": 1.0}, reconstruction_below=below, regression="mse")
    errors = (step.fake - step.batch.latents).square().mean((1, 2, 3))
    counted = torch.isin(step.sigma, torch.tensor(levels))
    torch.testing.assert_close(method.reconstruction_term(step), (errors * counted).mean())


def test_reconstruction_counts_timesteps_on_a_discrete_model(mix):
    """Its levels are no even parts of the highest sigma, and are of the timesteps."""
    method = toy_method(mix, TuneConfig({"reconstruction": 1.0}))
    process = DiscreteProcess(cumulative_alphas())
    method.student.backend.process = process
    method.levels = tuple(grid_sigmas(process, 4)[:-1].tolist())
    batch = next(b for n in range(9) if (b := mix.batch(n, 16, 0)).states is None)
    step = method.start(batch, ItemNoise(3, range(16)), 0)
    reached = torch.autograd.grad(method.reconstruction_term(step), step.fake)[0].flatten(1).any(1)
    assert torch.equal(reached, step.sigma < max(method.levels) * 0.999) and 0 < reached.sum() < 16


@pytest.mark.parametrize("sampler", ["euler", "renoise", "ancestral"])
@pytest.mark.parametrize("kept", [False, True], ids=["own", "kept"])
def test_agreement_asks_for_what_the_remaining_steps_make(mix, kept, sampler):
    method, step = started(mix, kept, terms={"agreement": 1.0}, agreement_sampler=sampler, regression="mse")
    target, counts = step.many_steps
    assert torch.equal(counts, step.sigma != LEVELS[-1]) and 0 < counts.sum() < 16
    noise = ItemNoise(3, range(16)).named("agreement")
    noises = [noise.normal_like(step.x) for _ in LEVELS[1:]]
    for row, sigma in enumerate(step.sigma.tolist()):
        index = LEVELS.index(sigma)
        fresh = iter([n[row : row + 1] for n in noises[index:]])
        alone = SAMPLERS[sampler](
            method.student,
            step.x[row : row + 1],
            explicit_sigmas(LEVELS[index:]),
            {"cond": step.batch.cond[[row]]},
            disable=True,
            noise_sampler=lambda a, b, fresh=fresh: next(fresh),
        )
        torch.testing.assert_close(target[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    errors = (step.fake - target).square().mean((1, 2, 3))
    torch.testing.assert_close(method.agreement_term(step), (errors * counts).mean())
    assert not target.requires_grad


def test_consistency_goes_down_the_turbos_list_with_the_same_noise(mix):
    terms = {"consistency": 1.0}
    method, step = started(mix, False, terms=terms, regression="mse", consistency_share=1.0)
    lower = dict(zip(LEVELS, [*LEVELS[1:], 0.0], strict=True))
    for row, sigma in enumerate(step.sigma.tolist()):
        below, latent, noise = lower[sigma], step.batch.latents[[row]], step.noise[[row]]
        x = (1 - below) * latent + below * noise
        answer = method.student(x, torch.tensor([below]), step.batch.cond[[row]]) if below else latent
        torch.testing.assert_close(step.consistency_target[[row]], answer, atol=1e-5, rtol=1e-4)
    method, step = started(mix, False, terms=terms, consistency_share=1.0, consistency_from="teacher")
    sigma = step.sigma.view(-1, 1, 1, 1)
    denoised = method.guided_teacher(step.x, step.sigma, step.batch.cond)
    last = step.sigma == LEVELS[-1]
    arrived = step.x + (step.x - denoised) / sigma * (0 - sigma)
    torch.testing.assert_close(step.consistency_target[last], arrived[last], atol=1e-5, rtol=1e-4)


def test_the_discriminator_sees_real_and_fake_changed_alike(mix, monkeypatch):
    method, step = started(mix, False, terms={"adversarial": 1.0}, augment=("cutout", "translation"))
    seen = []
    monkeypatch.setattr(step, "renoised", lambda latents, noise: seen.append(latents) or latents)
    assert step.fake_maps and step.real_maps
    assert torch.equal(seen[0], step.augmentation(step.fake)) and torch.equal(
        seen[1], step.augmentation(step.batch.latents)
    )
    assert not torch.equal(seen[0], step.fake)
    first = step.augmentation
    step.redraw()
    assert step.augmentation is not first


def test_a_step_with_nothing_for_the_discriminator_leaves_it_alone(mix):
    run = toy_run(mix, ladd=TuneConfig({"adversarial": 1.0, "keep": 1.0}), steps=6)
    for _ in range(6):
        before = {name: value.detach().clone() for name, value in run.players[1].parameters.items()}
        kept = run.batch(0)[0].states is not None
        logs = training_step(run)
        same = all(torch.equal(before[name], value) for name, value in run.players[1].parameters.items())
        assert same == kept and ("discriminator" in logs) == (not kept) and ("keep" in logs) == kept
        run.step += 1
    assert list(gradient_faults(run, next(b for n in range(9) if (b := mix.batch(n, 4, 0)).states is not None))) == []


def test_before_the_first_step_a_kept_batch_is_no_fault(mix):
    """The student is still the turbo there, and the keep term and its gradient are 0."""
    run = toy_run(mix, ladd=TuneConfig({"keep": 1.0, "adversarial": 1.0}))
    with torch.no_grad():
        for up in run.method.student.lora.up:
            up.zero_()
    before = {name: value.clone() for name, value in run.student_parameters.items()}
    batch = next(b for n in range(9) if (b := mix.batch(n, 4, 0)).states is not None)
    step = run.method.start(batch, ItemNoise(0, range(4)), 0)
    assert run.method.generator_loss(step)[0].item() == 0.0
    assert list(gradient_faults(run, batch)) == []
    assert all(torch.equal(before[name], value) for name, value in run.student_parameters.items())


def test_resumed_it_is_the_run_that_was_not_stopped(mix, tmp_path):
    config = TuneConfig(EVERY, augment=("translation", "flip"))
    for event in train(toy_run(mix, tmp_path / "a", config, discriminator_updates=2)):
        if event.step == 3:
            break
    for name in "ab":
        assert [e.step for e in train(toy_run(mix, tmp_path / name, config, discriminator_updates=2))][-1] == 6
    (a, _), (b, _) = (load_tensors(tmp_path / name / "checkpoint.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_beside_kept_samples_the_guidance_of_others_does_not_count(folders, tmp_path):
    """Own latents may be a teacher's, at its guidance; the turbo has its own."""
    teachers = cache_toy(tmp_path / "teachers", state_sigmas=())
    assert teachers.manifest()["guidance"] == 2.0
    both = open_data(new_mix({tmp_path / "teachers": 0.5, folders / "kept": 0.5}))
    assert both.guidance == 1.0 and torch.equal(both.uncond().context, toy_conds()[1].context)


def test_what_would_teach_nothing_is_refused(folders, mix, tmp_path):
    own, kept = (LatentDataset(folders / name) for name in ("own", "kept"))
    for data, config, words in (
        (own, TuneConfig(), "keep term needs samples of the turbo"),
        (kept, TuneConfig({"reconstruction": 1.0}), "no term counts on the turbo's own samples"),
        (own, TuneConfig({"denoising": 1.0}), None),
        (mix, TuneConfig(student_sigmas=(1.0, 0.6)), "kept samples were made at the levels 1, 0.75, 0.5, 0.25"),
    ):
        method = toy_method(data, config)
        if words is None:
            method.check(data.batch(0, 4, 0), 4)
            continue
        with pytest.raises(ValueError, match=words):
            method.check(data.batch(0, 4, 0), 4)
    with pytest.raises(ValueError, match="terms must weight some of adversarial"):
        TuneConfig({"pairs": 1.0})
    with pytest.raises(ValueError, match="augment must be one of"):
        replace(TuneConfig(), augment=("blur",))


def test_a_teachers_dataset_is_not_taken_for_a_kept_one_of_other_settings(tmp_path):
    """Kept samples and a teacher's latents in one folder do not mix."""
    cache_both(tmp_path)
    cond, empty = toy_conds()
    teacher = Guided(Denoiser(ToyBackend()), empty, 1.0)
    config = kept_config(LEVELS, 8, (4, 6), batch_size=4)
    with pytest.raises(ValueError, match="holds a dataset made with other settings"):
        list(cache_latents(teacher, cond, CHANNELS, config, tmp_path / "kept"))
