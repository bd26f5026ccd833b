import math

import pytest
import torch

from distill_core.diffusion.process import (
    ZERO_SNR_ALPHA,
    DiscreteProcess,
    FlowProcess,
    cumulative_alphas,
    expand_like,
    zero_terminal_snr,
)


@pytest.fixture(scope="module")
def eps():
    return DiscreteProcess(cumulative_alphas(), "eps")


@pytest.fixture(scope="module")
def v_zero_snr():
    return DiscreteProcess(zero_terminal_snr(cumulative_alphas()), "v")


def clean_and_noise(batch=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 6, 8, generator=g), torch.randn(batch, 4, 6, 8, generator=g)


def perfect_output(process, sigma, x0, noise):
    """What a network that knows x0 returns, from the papers' definitions of eps, v and velocity."""
    if isinstance(process, FlowProcess):
        return noise - x0
    if process.prediction == "eps":
        return noise
    alpha_root = (1 / (1 + expand_like(sigma, x0) ** 2)).sqrt()
    return alpha_root * noise - (1 - alpha_root**2).sqrt() * x0


PROCESSES = {
    "flow": lambda: FlowProcess(),
    "eps": lambda: DiscreteProcess(cumulative_alphas(), "eps"),
    "v": lambda: DiscreteProcess(cumulative_alphas(), "v"),
    "v, zero terminal SNR": lambda: DiscreteProcess(zero_terminal_snr(cumulative_alphas()), "v"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_network_gives_back_the_clean_latent(name):
    process = PROCESSES[name]()
    x0, noise = clean_and_noise()
    sigma = torch.tensor([process.sigma_max, 0.7, max(process.sigma_min, 0.03)])
    x = process.noise_scaling(sigma, noise, x0)
    denoised = process.calculate_denoised(sigma, perfect_output(process, sigma, x0, noise), x)
    torch.testing.assert_close(denoised, x0, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_flow_time_round_trip_and_equal_signal_to_noise_ratio(name):
    process = PROCESSES[name]()
    time = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    sigma = process.sigma_at_flow_time(time)
    torch.testing.assert_close(process.flow_time(sigma), time)
    x0, noise = torch.ones(5, 1), torch.ones(5, 1)
    signal = process.noise_scaling(sigma, noise * 0, x0)
    spread = process.noise_scaling(sigma, noise, x0 * 0)
    torch.testing.assert_close((spread / signal).flatten(), time / (1 - time))


def test_flow_noising_is_linear_interpolation():
    x0, noise = clean_and_noise()
    process = FlowProcess()
    x = process.noise_scaling(torch.tensor([1.0, 0.25, 0.0]), noise, x0)
    assert torch.equal(x[0], noise[0])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(x[2], x0[2])
    assert process.calculate_input(torch.ones(3), x) is x


@pytest.mark.parametrize("multiplier", [1.0, 1000.0])
def test_flow_timestep_is_the_scaled_sigma(multiplier):
    assert FlowProcess(multiplier).timestep(torch.tensor([0.3])).item() == pytest.approx(0.3 * multiplier)


def test_sigma_may_be_a_scalar_or_one_value_per_row():
    x0, noise = clean_and_noise(2)
    for process in (FlowProcess(), DiscreteProcess(cumulative_alphas())):
        scalar = process.noise_scaling(torch.tensor(0.5), noise, x0)
        assert torch.equal(scalar, process.noise_scaling(torch.tensor([0.5, 0.5]), noise, x0))


@pytest.mark.parametrize(
    "timestep, sigma", [(999, 14.61), (899, 8.30), (799, 5.09), (699, 3.32), (749, 4.08), (499, 1.61), (249, 0.69)]
)
def test_sigmas_of_stable_diffusion(eps, timestep, sigma):
    assert eps.sigma(torch.tensor(timestep)).item() == pytest.approx(sigma, abs=0.006)


def test_sigma_range_of_stable_diffusion(eps):
    assert eps.sigma_min == pytest.approx(0.0292, abs=1e-4)
    assert eps.sigma_max == pytest.approx(14.6146, abs=1e-3)


def test_sigma_and_timestep_are_inverse_on_all_trained_timesteps(eps):
    timesteps = torch.arange(1000)
    torch.testing.assert_close(eps.sigma(timesteps), eps.sigmas)
    assert torch.equal(eps.timestep(eps.sigmas), timesteps)


def test_timestep_is_the_nearest_in_log_sigma(eps):
    sigma = torch.tensor([0.001, 0.3, 1.0, 2.345, 14.0, 100.0])
    logs = eps.log_sigmas.values.tolist()
    expected = [min(range(1000), key=lambda t: abs(math.log(s) - logs[t])) for s in sigma.tolist()]
    assert eps.timestep(sigma).tolist() == expected
    assert expected[1] == 81  # what ComfyUI's EPS model_sampling gives for 0.3


def test_fractional_timesteps_lie_between_their_neighbours(eps):
    low, middle, high = eps.sigma(torch.tensor([499.0, 499.5, 500.0])).tolist()
    assert middle == pytest.approx((low * high) ** 0.5)


def test_max_denoise_gives_the_network_unit_variance(eps):
    noise = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([eps.sigma_max])
    x = eps.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
    torch.testing.assert_close(eps.calculate_input(sigma, x), noise)  # exactly the unit noise itself
    plain = eps.calculate_input(sigma, eps.noise_scaling(sigma, noise, torch.zeros_like(noise)))
    assert (plain.std() / noise.std()).item() == pytest.approx(0.9977, abs=1e-4)  # diffusers' start


def test_zero_terminal_snr_keeps_the_first_alpha_and_ends_in_zero():
    before, after = cumulative_alphas(), zero_terminal_snr(cumulative_alphas())
    assert after[-1] == 0
    assert after[0].item() == pytest.approx(before[0].item())


def test_zero_terminal_snr_sigma_max_is_that_of_diffusers_and_comfyui(v_zero_snr):
    assert v_zero_snr.sigma_max == pytest.approx(math.sqrt(1 / ZERO_SNR_ALPHA - 1))  # 4096
    assert torch.isfinite(v_zero_snr.sigmas).all()


def test_a_process_leaves_the_callers_table_alone():
    alphas = zero_terminal_snr(cumulative_alphas())
    DiscreteProcess(alphas, "v")
    assert alphas[-1] == 0


def test_eps_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DiscreteProcess(zero_terminal_snr(cumulative_alphas()), "eps")


@pytest.mark.parametrize(
    "alphas, prediction",
    [
        ([0.9, 0.5], "x0"),
        ([0.5, 0.9], "eps"),
        ([0.9, 0.9], "eps"),
        ([1.1, 0.5], "eps"),
        ([0.5, -0.1], "v"),
        ([0.5], "eps"),
    ],
)
def test_bad_tables_and_predictions_are_refused(alphas, prediction):
    with pytest.raises(ValueError):
        DiscreteProcess(torch.tensor(alphas), prediction)


def test_flow_times_outside_the_trained_range_are_clamped(eps):
    sigma = eps.sigma_at_flow_time(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(sigma, torch.tensor([eps.sigma_min, eps.sigma_max]))
