import pytest
import torch

from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas, expand_like
from distill_core.diffusion.samplers import (
    SAMPLERS,
    item_noise_sampler,
    sample,
    sample_ancestral,
    sample_euler,
    sample_renoise,
    sample_scm,
    sample_tcd,
)
from distill_core.diffusion.schedules import (
    grid_sigmas,
    lcm_timesteps,
    sigmas_at_timesteps,
    trigflow_sigmas,
    turbo_timesteps,
)
from distill_core.models.denoiser import Cond

FLOW, EPS = FlowProcess(shift_alpha=3.0), DiscreteProcess(cumulative_alphas(), "eps")
SHAPE = (4, 4, 8)


class Toy:
    """A denoiser whose network is an elementwise function: rows of a batch cannot influence each other's rounding."""

    def __init__(self, process):
        self.process, self.calls = process, []

    def network(self, x, timestep):
        return torch.tanh(0.7 * x) + 1e-4 * expand_like(timestep, x)

    def __call__(self, x, sigma, **extra_args):
        self.calls.append((x, sigma, extra_args))
        output = self.network(self.process.calculate_input(sigma, x), self.process.timestep(sigma))
        return self.process.calculate_denoised(sigma, output, x)


class Perfect:
    """Knows the clean latent."""

    def __init__(self, process, x0):
        self.process, self.x0 = process, x0

    def __call__(self, x, sigma):
        return self.x0.expand_as(x)


def latent(batch=3, seed=0):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def trajectory(sampler, model, x, sigmas, **options):
    """The x of every step and the result."""
    seen = []
    result = sampler(model, x, sigmas, callback=lambda info: seen.append(info["x"]), disable=True, **options)
    return [*seen, result]


both_processes = pytest.mark.parametrize("process", [FLOW, EPS], ids=["flow", "eps"])
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@every_sampler
@both_processes
def test_contract(name, process):
    model, x, sigmas, infos = Toy(process), latent(), grid_sigmas(process, 4), []
    result = SAMPLERS[name](model, x, sigmas, {"seed": 1}, infos.append, True)
    assert len(model.calls) == 4
    for i, ((model_x, sigma, extra_args), info) in enumerate(zip(model.calls, infos, strict=True)):
        assert set(info) == {"i", "x", "sigma", "sigma_hat", "denoised"}
        assert info["i"] == i and info["sigma"] == info["sigma_hat"] == sigmas[i]
        assert info["x"] is model_x and info["denoised"].shape == x.shape
        assert torch.equal(sigma, sigmas[i].expand(len(x))) and extra_args == {"seed": 1}
    assert result is infos[-1]["denoised"]


@every_sampler
def test_one_step_returns_the_denoised_latent(name):
    model, x, sigmas = Toy(EPS), latent(), grid_sigmas(EPS, 1)
    assert torch.equal(SAMPLERS[name](model, x, sigmas, disable=True), Toy(EPS)(x, sigmas[:1].expand(3)))


def test_renoise_flow_equals_the_formula():
    x, sigmas, fresh = latent(), grid_sigmas(FLOW, 3), iter([latent(seed=5), latent(seed=6)])
    steps = trajectory(sample_renoise, Toy(FLOW), x, sigmas, noise_sampler=lambda s, n: next(fresh))
    for i, noise in enumerate([latent(seed=5), latent(seed=6)]):
        s, n = sigmas[i], sigmas[i + 1]
        x0 = x - s * (torch.tanh(0.7 * x) + 1e-4 * 1000 * s)
        x = (1 - n) * x0 + n * noise
        torch.testing.assert_close(steps[i + 1], x)


def test_renoise_variance_preserving_equals_the_formula():
    timesteps = [999, 499]
    x, sigmas, noise = 14 * latent(), sigmas_at_timesteps(EPS, timesteps), latent(seed=5)
    steps = trajectory(sample_renoise, Toy(EPS), x, sigmas, noise_sampler=lambda s, n: noise)
    x0 = x - sigmas[0] * (torch.tanh(0.7 * x / (1 + sigmas[0] ** 2).sqrt()) + 1e-4 * 999)
    torch.testing.assert_close(steps[1], x0 + sigmas[1] * noise)


@pytest.mark.parametrize("name", ["renoise", "ancestral"])
def test_noise_sampler_gets_the_levels_of_each_step_but_the_last(name):
    sigmas, asked = grid_sigmas(FLOW, 4), []

    def noise_sampler(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return latent()

    SAMPLERS[name](Toy(FLOW), latent(), sigmas, disable=True, noise_sampler=noise_sampler)
    levels = sigmas.tolist()
    assert asked == list(zip(levels[:-2], levels[1:-1], strict=True))


def test_euler_equals_diffusers_flow_match_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # diffusers applies the shift itself
    torch.testing.assert_close(scheduler.sigmas, grid_sigmas(FLOW, 4))
    model, x = Toy(FLOW), latent()
    steps = trajectory(sample_euler, model, x, scheduler.sigmas)
    for i, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(steps[i], x)
        x = scheduler.step(model.network(x, timestep.expand(len(x))), timestep, x).prev_sample
    torch.testing.assert_close(steps[-1], x)


def diffusers_discrete(name):
    import diffusers

    return getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )


def test_euler_equals_diffusers_trailing_euler_scheduler():
    scheduler = diffusers_discrete("EulerDiscreteScheduler")
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, grid_sigmas(EPS, 4))
    model, x = Toy(EPS), latent() * scheduler.init_noise_sigma
    steps = trajectory(sample_euler, model, x, scheduler.sigmas)
    for i, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(steps[i], x, rtol=1e-4, atol=1e-4)
        eps = model.network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
        x = scheduler.step(eps, timestep, x).prev_sample
    torch.testing.assert_close(steps[-1], x, rtol=1e-4, atol=1e-4)


def test_ancestral_equals_diffusers_euler_ancestral_scheduler():
    scheduler = diffusers_discrete("EulerAncestralDiscreteScheduler")
    scheduler.set_timesteps(4)
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    model, x = Toy(EPS), latent() * scheduler.init_noise_sigma
    steps = trajectory(
        sample_ancestral, model, x, scheduler.sigmas, noise_sampler=lambda s, n: torch.randn(x.shape, generator=ours)
    )
    for i, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(steps[i], x, rtol=1e-4, atol=1e-4)
        eps = model.network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
        x = scheduler.step(eps, timestep, x, generator=theirs).prev_sample
    torch.testing.assert_close(steps[-1], x, rtol=1e-4, atol=1e-4)


@both_processes
def test_ancestral_without_eta_is_euler(process):
    x, sigmas = latent() * process.sigma_max, grid_sigmas(process, 4)
    ancestral = sample_ancestral(Toy(process), x, sigmas, disable=True, eta=0.0)
    torch.testing.assert_close(ancestral, sample_euler(Toy(process), x, sigmas, disable=True))
    assert not torch.allclose(ancestral, sample_ancestral(Toy(process), x, sigmas, disable=True, eta=1.0))


def test_ancestral_share_of_old_noise_on_the_turbo_grid():
    """32, 38 and 43 % of the noise variance of the next level come from the old noise."""
    sigmas, x0, noise = sigmas_at_timesteps(EPS, turbo_timesteps(4)), latent(), latent(seed=1)
    x = x0 + sigmas[0] * noise
    steps = trajectory(sample_ancestral, Perfect(EPS, x0), x, sigmas, noise_sampler=lambda s, n: torch.zeros_like(x))
    kept = [((steps[i + 1] - x0).std() / sigmas[i + 1]) / ((steps[i] - x0).std() / sigmas[i]) for i in range(3)]
    assert [round(100 * k.item() ** 2) for k in kept] == [32, 38, 43]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@both_processes
def test_ancestral_keeps_the_marginals(process, eta):
    """With a perfect denoiser every step has the signal and the noise level that its sigma says (Monte Carlo)."""
    x0, sigmas = torch.tensor(2.0), grid_sigmas(process, 4)
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(1, 200_000, generator=noise)
    x = process.noise_scaling(sigmas[:1], start, x0.expand_as(start))
    steps = trajectory(
        sample_ancestral,
        Perfect(process, x0),
        x,
        sigmas,
        eta=eta,
        noise_sampler=lambda s, n: torch.randn(x.shape, generator=noise),
    )
    for step, sigma in zip(steps[:-1], sigmas.tolist(), strict=False):
        signal = (1 - sigma) if process is FLOW else 1.0
        assert step.std().item() == pytest.approx(sigma, rel=0.01)
        assert step.mean().item() == pytest.approx(2 * signal, abs=0.01 * max(sigma, 1))


class CondToy(Toy):
    def __call__(self, x, sigma, cond):
        return super().__call__(x, sigma) + cond.pooled.reshape(-1, 1, 1, 1)


def pooled(rows):
    return Cond(torch.zeros(len(rows), 1, 1), torch.tensor([0.1 * r for r in rows]).reshape(-1, 1))


@every_sampler
@both_processes
def test_an_item_is_bit_for_bit_the_same_alone_and_in_a_batch(name, process):
    def run(items):
        sigmas = grid_sigmas(process, 4)
        return sample(CondToy(process), process, sigmas, pooled(items), SHAPE, seed=7, items=items, sampler=name)

    batch, alone = run(range(5)), run([3])
    assert torch.equal(batch[3], alone[0])
    assert torch.equal(run([4, 3])[1], alone[0])
    assert not torch.allclose(batch[3], batch[2])


@pytest.mark.parametrize("name", ["renoise", "ancestral"])
def test_default_injected_noise_belongs_to_the_row(name):
    x, sigmas = latent(4), grid_sigmas(EPS, 4)
    whole = SAMPLERS[name](Toy(EPS), x, sigmas, {"seed": 5}, disable=True)
    assert torch.equal(SAMPLERS[name](Toy(EPS), x[:2], sigmas, {"seed": 5}, disable=True), whole[:2])
    assert not torch.allclose(SAMPLERS[name](Toy(EPS), x, sigmas, {"seed": 6}, disable=True), whole)


def test_default_injected_noise_is_not_the_initial_noise_of_the_same_seed():
    x = latent()
    assert not torch.allclose(item_noise_sampler(x, seed=4)(1.0, 0.5), ItemNoise(4, range(3)).normal_like(x))


@both_processes
def test_sample_starts_from_noise_of_unit_variance_at_the_first_level(process):
    sigmas, model = grid_sigmas(process, 1), CondToy(process)
    sample(model, process, sigmas, pooled([0, 1]), SHAPE, seed=3, items=[0, 1])
    x, sigma, _ = model.calls[0]
    torch.testing.assert_close(process.calculate_input(sigma, x), ItemNoise(3, [0, 1]).normal(*SHAPE))
    assert sigma.tolist() == pytest.approx([process.sigma_max] * 2)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_tcd_equals_diffusers_tcd_scheduler(eta):
    """In variance-preserving coordinates, x sqrt(alpha); the last step is ours (diffusers stops at timestep 0)."""
    from diffusers import TCDScheduler

    scheduler = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == lcm_timesteps(4)
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    sigmas = sigmas_at_timesteps(EPS, lcm_timesteps(4))
    model, x = Toy(EPS), latent() * sigmas[0]
    fresh = lambda s, n: torch.randn(x.shape, generator=ours)  # noqa: E731
    steps = trajectory(sample_tcd, model, x, sigmas, noise_sampler=fresh, eta=eta)
    scaled = EPS.calculate_input(sigmas[:1], x)
    for i, timestep in enumerate(scheduler.timesteps[:3]):
        eps = model.network(scaled, timestep.expand(len(x)))
        scaled = scheduler.step(eps, timestep, scaled, eta=eta, generator=theirs).prev_sample
        torch.testing.assert_close(EPS.calculate_input(sigmas[i + 1], steps[i + 1]), scaled, rtol=1e-4, atol=1e-4)


def test_scm_equals_diffusers_scm_scheduler():
    from diffusers import SCMScheduler

    scheduler = SCMScheduler(sigma_data=1.0)
    scheduler.set_timesteps(2)
    sigmas = trigflow_sigmas(2)
    torch.testing.assert_close(torch.atan2(sigmas, 1 - sigmas), scheduler.timesteps.float(), rtol=0, atol=1e-5)
    flow, noise = FlowProcess(), latent(seed=5)
    x = latent()
    steps = trajectory(sample_scm, Toy(flow), x, sigmas, noise_sampler=lambda s, n: noise)
    x0 = Toy(flow)(x, sigmas[:1].expand(3))
    angle = torch.tensor(1.3)
    expected = angle.cos() * x0 + angle.sin() * noise  # TrigFlow's x is ours times cos t + sin t
    torch.testing.assert_close(steps[1] * (angle.cos() + angle.sin()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [sample_tcd, sample_scm])
@both_processes
def test_tcd_and_scm_without_eta_are_euler(sampler, process):
    x, sigmas = latent() * process.sigma_max, grid_sigmas(process, 4)
    result = sampler(Toy(process), x, sigmas, disable=True, eta=0.0)
    torch.testing.assert_close(result, sample_euler(Toy(process), x, sigmas, disable=True), rtol=1e-4, atol=1e-4)


def test_scm_with_full_eta_is_renoise():
    x, sigmas = latent(), grid_sigmas(FLOW, 4)
    expected = sample_renoise(Toy(FLOW), x, sigmas, {"seed": 2}, disable=True)
    torch.testing.assert_close(sample_scm(Toy(FLOW), x, sigmas, {"seed": 2}, disable=True), expected)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sampler", [sample_tcd, sample_scm])
@both_processes
def test_tcd_and_scm_keep_the_marginals(sampler, process, eta):
    """As for the ancestral sampler: signal and noise level of every step are those of its sigma."""
    x0, sigmas = torch.tensor(2.0), grid_sigmas(process, 4)
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(1, 200_000, generator=noise)
    x = process.noise_scaling(sigmas[:1], start, x0.expand_as(start))
    fresh = lambda s, n: torch.randn(x.shape, generator=noise)  # noqa: E731
    steps = trajectory(sampler, Perfect(process, x0), x, sigmas, eta=eta, noise_sampler=fresh)
    for step, sigma in zip(steps[:-1], sigmas.tolist(), strict=False):
        signal = (1 - sigma) if process is FLOW else 1.0
        assert step.std().item() == pytest.approx(sigma, rel=0.01)
        assert step.mean().item() == pytest.approx(2 * signal, abs=0.01 * max(sigma, 1))
