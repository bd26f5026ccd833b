"""The denoising term: ordinary training, by hand, in float64, on flow, eps and v models; alone and beside others."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest, norm
from toy import LEVELS, ToyBackend, cache_toy, toy_method, toy_parts, toy_run

from distill_core.data.dataset import Batch
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import draw_whole_schedule
from distill_core.methods.add import ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.losses import denoising_weight
from distill_core.training.loop import train, training_step

ALONE = LADDConfig({"denoising": 1.0})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def method_on(dataset, process, config=ALONE):
    parts = toy_parts()
    parts.backend.process = process
    return toy_method(dataset, config, parts=parts)


PROCESSES = {
    "flow": FlowProcess(),
    "eps": DiscreteProcess(cumulative_alphas()),
    "v": DiscreteProcess(cumulative_alphas(), "v"),
}


@pytest.mark.parametrize("kind", PROCESSES)
def test_it_is_the_models_own_training_loss(dataset, kind):
    """Loss and gradient against the network's raw output and the target of its training, in float64."""
    process = PROCESSES[kind]
    method = method_on(dataset, process)
    backend, batch = method.student.backend, dataset.batch(0, 8, 0)
    backend.network.double(), method.student.lora.double()
    latents, cond = batch.latents.double(), batch.cond.map(torch.Tensor.double)
    step = method.start(Batch(latents, cond), ItemNoise(1, range(8)), 0)
    step.sigma = step.sigma.double()
    below = step.sigma < process.sigma_max * (1 - 1e-4)
    assert below.all() and step.denoises.all()
    loss = method.denoising_term(step)

    sigma, noise = step.sigma.view(-1, 1, 1, 1), step.noise
    with backend.switch.on(method.student.lora):
        if kind == "flow":
            output = backend.forward((1 - sigma) * latents + sigma * noise, step.sigma * 1000, cond)
            expected = (output - (noise - latents)).square().mean()
        else:
            alpha = (1 + sigma**2) ** -0.5
            timestep = process.timestep(step.sigma)
            output = backend.forward(alpha * latents + alpha * sigma * noise, timestep, cond)
            snr = sigma.flatten() ** -2
            target = noise if kind == "eps" else alpha * noise - alpha * sigma * latents
            weight = snr.clamp(max=5) / (snr if kind == "eps" else snr + 1)
            expected = (weight * (output - target).square().mean((1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(method.student.trainable().values())
    for a, b in zip(*(torch.autograd.grad(v, parameters) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_levels_are_drawn_from_the_whole_schedule():
    random = ItemNoise(0, range(4000))
    flow = draw_whole_schedule(random.named("a"), FlowProcess())
    assert kstest(torch.logit(flow.double()).numpy(), norm(0, 1).cdf).pvalue > 1e-3
    shifted = draw_whole_schedule(random.named("b"), FlowProcess(shift_alpha=3.0)).double()
    assert kstest((torch.logit(shifted) - torch.tensor(3.0).log()).numpy(), norm(0, 1).cdf).pvalue > 1e-3
    process = DiscreteProcess(cumulative_alphas())
    timesteps = process.timestep(draw_whole_schedule(random.named("c"), process))
    counts = torch.histc(timesteps.float(), 10, 0, 1000)
    assert (counts - 400).abs().max() < 100 and timesteps.min() < 5 and timesteps.max() > 994


def test_weights_of_low_noise_are_bounded_on_discrete_models():
    sigma = torch.tensor([0.03, 1.0, 14.6])
    discrete = denoising_weight(PROCESSES["eps"], sigma)
    torch.testing.assert_close(discrete, torch.tensor([5.0, 1.0, 14.6**-2]))
    torch.testing.assert_close(denoising_weight(PROCESSES["flow"], sigma[1:2]), torch.ones(1))


@pytest.mark.parametrize("config", [LADDConfig, ADDConfig, Diffusion2GANConfig, DMD2Config], ids=lambda c: c.name)
def test_alone_there_is_no_discriminator_and_no_teacher(dataset, config, monkeypatch):
    run = toy_run(dataset, ladd=config({"denoising": 1.0}), steps=3)
    assert [player.name for player in run.players] == ["generator"] and run.method.discriminator is None
    forwards, plain = [], ToyBackend.forward
    monkeypatch.setattr(ToyBackend, "forward", lambda self, *a: forwards.append(self.switch.active) or plain(self, *a))
    monkeypatch.setattr(ToyBackend, "maps", lambda *a: pytest.fail("features are not needed"))
    events = list(train(run))
    assert forwards == [run.method.student.lora] * 3  # one forward a step, the student's
    assert "denoising" in events[-1].logs and "discriminator" not in events[-1].logs


def test_it_learns(dataset):
    run = toy_run(dataset, ladd=ALONE, steps=60, batch_size=16)

    def loss() -> float:
        step = run.method.start(dataset.batch(0, 400, 0), ItemNoise(9, range(400)), 0)
        return run.method.denoising_term(step).item()

    before = loss()
    for _ in train(run):
        pass
    assert loss() < 0.97 * before


@pytest.mark.parametrize("levels", ["all", "student"])
def test_it_takes_a_share_of_the_items(dataset, levels):
    config = LADDConfig(
        {"adversarial": 1.0, "denoising": 1.0}, warmup_steps=0, denoising_levels=levels, denoising_share=0.3
    )
    method = toy_method(dataset, config)
    step = method.start(dataset.batch(0, 400, 0), ItemNoise(2, range(400)), 0)
    assert step.denoises.float().mean().item() == pytest.approx(0.3, abs=0.07)
    on_level = torch.isin(step.sigma, torch.tensor(LEVELS))
    assert on_level[~step.denoises].all() and (on_level.all() if levels == "student" else not on_level.all())


def test_no_other_term_counts_for_items_that_are_denoised(dataset):
    """The gradient of the others by what the student gave for these items is 0, and that of denoising by the rest."""
    terms = {"adversarial": 1.0, "pairs": 1.0, "consistency": 1.0, "denoising": 1.0}
    method = toy_method(dataset, LADDConfig(terms, warmup_steps=0))
    step = method.start(dataset.batch(0, 16, 0), ItemNoise(2, range(16)), 0)
    assert 0 < step.denoises.sum() < 16 and not (step.denoises & (step.on_path | step.on_grid)).any()
    for name, term in method.terms().items():
        reached = torch.autograd.grad(term(step), step.fake, retain_graph=True)[0].flatten(1).any(1)
        assert not (reached & (~step.denoises if name == "denoising" else step.denoises)).any(), name
        assert reached.any(), name


def test_the_discriminator_is_not_shown_them(dataset):
    """Logits of items that are denoised do not enter its loss; a batch of nothing else gives it a loss of 0."""
    method = toy_method(dataset, LADDConfig({"adversarial": 1.0, "denoising": 1.0}, warmup_steps=0))
    step = method.start(dataset.batch(0, 8, 0), ItemNoise(2, range(8)), 0)
    rows = step.judged
    fake, real = torch.randn(2, 8, 5).unbind()
    loss = method.game(method.gan_discriminator, step, fake, real)
    expected = method.gan_discriminator(fake[rows], real[rows]) * len(rows) / 8
    torch.testing.assert_close(loss, expected)
    step.judged = []
    assert method.game(method.gan_discriminator, step, fake, real).item() == 0.0
    assert method.discriminator_loss(step)[0].isfinite()


def test_of_a_mix_what_has_no_pairs_is_denoised_whole(dataset):
    method = toy_method(dataset, LADDConfig({"pairs": 1.0, "denoising": 1.0}))
    batch = dataset.batch(0, 8, 0)
    own = Batch(batch.latents, batch.cond, None, batch.state_sigmas)
    assert method.start(own, ItemNoise(2, range(8)), 0).denoises.all()
    assert not method.start(batch, ItemNoise(2, range(8)), 0).denoises.all()


def test_consistency_can_work_on_the_students_own_levels(dataset):
    config = LADDConfig({"consistency": 1.0}, consistency_levels=0, consistency_share=1.0)
    method = toy_method(dataset, config)
    step = method.start(dataset.batch(0, 8, 0), ItemNoise(2, range(8)), 0)
    assert torch.isin(step.sigma, torch.tensor(LEVELS)).all() and step.on_grid.all()
    assert training_step(toy_run(dataset, ladd=config))["consistency"] > 0
