import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas, zero_terminal_snr
from distill_core.diffusion.schedules import (
    draw_evenly,
    draw_from_grid,
    explicit_sigmas,
    grid_sigmas,
    logit_normal,
    shift_sigmas,
    shifted_sigmas,
    sigmas_at_timesteps,
    trailing_timesteps,
    turbo_timesteps,
    with_levels,
)

EPS = DiscreteProcess(cumulative_alphas(), "eps")
V_ZERO_SNR = DiscreteProcess(zero_terminal_snr(cumulative_alphas()), "v")


def assert_levels(sigmas, expected, tolerance=5e-5):
    assert sigmas.dtype == torch.float32 and sigmas.ndim == 1
    assert sigmas.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("steps, timesteps", [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_trailing_timesteps(steps, timesteps):
    assert trailing_timesteps(steps) == timesteps


@pytest.mark.parametrize("steps, timesteps", [(1, [999]), (2, [999, 899]), (4, [999, 899, 799, 699])])
def test_turbo_timesteps(steps, timesteps):
    assert turbo_timesteps(steps) == timesteps


def test_sigmas_of_the_trailing_and_turbo_lists():
    assert_levels(sigmas_at_timesteps(EPS, trailing_timesteps(4)), [14.61, 4.08, 1.61, 0.69, 0], 0.006)
    assert_levels(sigmas_at_timesteps(EPS, turbo_timesteps(4)), [14.61, 8.30, 5.09, 3.32, 0], 0.006)


def test_sd35_turbo_list():
    assert_levels(shifted_sigmas(4, shift_alpha=3), [1, 0.9, 0.75, 0.5, 0])


def test_qwen_list():
    assert_levels(shifted_sigmas(4, shift_mu=1.15), [1, 0.9045, 0.7595, 0.5128, 0])


def test_flux_schnell_list():
    assert_levels(shifted_sigmas(4, shift_alpha=1), [1, 0.75, 0.5, 0.25, 0])


def test_grid_of_a_process_is_shifted_for_flow_and_trailing_for_discrete():
    assert_levels(grid_sigmas(FlowProcess(shift_alpha=3.0), 2), [1, 0.75, 0])
    assert torch.equal(grid_sigmas(EPS, 4), sigmas_at_timesteps(EPS, [999, 749, 499, 249]))


@given(steps=st.integers(1, 200), alpha=st.floats(0.1, 20))
def test_shifted_grids_fall_from_1_to_0_and_both_units_agree(steps, alpha):
    sigmas = shifted_sigmas(steps, shift_alpha=alpha)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(1) and sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    torch.testing.assert_close(sigmas, shifted_sigmas(steps, shift_mu=math.log(alpha)))


@given(steps=st.integers(1, 1000))
def test_trailing_grids_fall_inside_the_trained_range_and_start_at_its_end(steps):
    for process in (EPS, V_ZERO_SNR):
        sigmas = grid_sigmas(process, steps)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0
        assert sigmas[0] == pytest.approx(process.sigma_max)
        assert (sigmas[1:] < sigmas[:-1]).all() and sigmas[-2] >= process.sigma_min


@given(st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, unique=True))
def test_explicit_lists_are_kept_and_closed_with_0(levels):
    levels = sorted(levels, reverse=True)
    assert explicit_sigmas(levels).tolist() == [*levels, 0.0]
    assert explicit_sigmas([*levels, 0.0]).tolist() == [*levels, 0.0]


@given(alpha=st.floats(0.1, 20), time=st.floats(0.01, 0.99))
def test_shift_adds_its_logarithm_to_the_logit(alpha, time):
    time = torch.tensor(time, dtype=torch.float64)
    shifted = shift_sigmas(time, shift_alpha=alpha)
    assert torch.logit(shifted).item() == pytest.approx(torch.logit(time).item() + math.log(alpha), abs=1e-9)


@pytest.mark.parametrize(
    "levels", [[], [0.0], [0.5, 0.5], [0.5, 0.7], [1.0, -0.5], [1.0, 0.0, 0.0], [math.inf], [math.nan]]
)
def test_bad_explicit_lists_are_refused(levels):
    with pytest.raises(ValueError):
        explicit_sigmas(levels)


@pytest.mark.parametrize(
    "call",
    [
        lambda: shifted_sigmas(0, shift_alpha=3),
        lambda: trailing_timesteps(0),
        lambda: trailing_timesteps(1001),
        lambda: turbo_timesteps(11),
        lambda: shift_sigmas(torch.ones(1)),
        lambda: shift_sigmas(torch.ones(1), shift_alpha=3, shift_mu=1),
        lambda: shift_sigmas(torch.ones(1), shift_alpha=0),
    ],
)
def test_bad_step_counts_and_shifts_are_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize(
    "mean, quantiles",
    [
        (1.0, [0.34, 0.58, 0.73, 0.84, 0.93]),
        (0.5, [0.24, 0.46, 0.62, 0.76, 0.90]),
        (0.0, [0.16, 0.34, 0.50, 0.66, 0.84]),
        (-1.0, [0.07, 0.16, 0.27, 0.42, 0.66]),
    ],
)
def test_logit_normal_quantiles(mean, quantiles):
    random = ItemNoise(0, range(50))
    times = torch.cat([logit_normal(random, mean, 1.0) for _ in range(200)])
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert torch.quantile(times, levels).tolist() == pytest.approx(quantiles, abs=0.02)


def test_logit_normal_std_spreads_the_logits():
    random = ItemNoise(0, range(50))
    times = torch.cat([logit_normal(random, 0.0, 0.25) for _ in range(100)])
    assert torch.logit(times).std().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("probabilities", [[0.7, 0.1, 0.1, 0.1], [0, 0, 0.5, 0.5], [2, 1, 1, 0]])
def test_draw_from_grid_frequencies(probabilities):
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25])
    random = ItemNoise(0, range(50))
    drawn = torch.cat([draw_from_grid(random, levels, probabilities) for _ in range(100)])
    for level, probability in zip(levels, probabilities, strict=True):
        share = (drawn == level).float().mean().item()
        assert share == pytest.approx(probability / sum(probabilities), abs=0.03)
        assert share == 0 or probability > 0


def test_draw_from_grid_at_the_edges_never_takes_a_level_of_probability_0():
    class Edges:
        def uniform(self):
            return torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])

    drawn = draw_from_grid(Edges(), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.1]), [0, 1, 0, 3, 0])
    assert drawn.tolist() == [0.75, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("probabilities", [[1.0], [0.5, -0.5, 1], [0, 0, 0]])
def test_bad_probabilities_are_refused(probabilities):
    with pytest.raises(ValueError, match="probabilities"):
        draw_from_grid(ItemNoise(0, [0]), torch.tensor([1.0, 0.5, 0.2]), probabilities)


def test_levels_are_put_into_a_grid_once():
    grid = torch.tensor([1.0, 0.6, 0.3, 0.0])
    assert with_levels(grid, (1.00005, 0.5)).tolist() == pytest.approx([1.00005, 0.6, 0.5, 0.3, 0.0])
    assert torch.equal(with_levels(grid, ()), grid)


def test_levels_drawn_evenly_are_even_in_the_models_own_timesteps():
    random = ItemNoise(0, range(4000))
    flow = draw_evenly(random.named("a"), FlowProcess(), 0.02, 0.98)
    assert 0.02 <= flow.min() < 0.03 and 0.97 < flow.max() <= 0.98
    assert torch.histc(flow, 8, 0.02, 0.98).tolist() == pytest.approx([500] * 8, abs=90)
    shifted = draw_evenly(random.named("b"), FlowProcess(shift_alpha=3.0), 0.0, 1.0)
    even = shifted / (3 - 2 * shifted)  # the shift taken back
    assert torch.histc(even, 8, 0, 1).tolist() == pytest.approx([500] * 8, abs=90)
    timesteps = EPS.timestep(draw_evenly(random.named("c"), EPS, 0.02, 0.98))
    assert timesteps.min() >= 20 and timesteps.max() < 980
    assert torch.histc(timesteps.float(), 8, 20, 980).tolist() == pytest.approx([500] * 8, abs=90)
