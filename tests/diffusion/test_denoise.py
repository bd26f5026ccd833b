"""Exact denoise (schedules.py): the start level is a continuous, rising function of denoise at any step count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_core.diffusion.process import DiscreteProcess, cumulative_alphas
from distill_core.diffusion.schedules import (
    DENOISE_MODES,
    check_sigmas,
    level_denoise,
    respace_denoise,
    shifted_sigmas,
    sigmas_at_timesteps,
    snap_denoise,
    trailing_timesteps,
    turbo_timesteps,
)
from distill_core.presets.levels import preset_sigmas
from distill_core.presets.table import find_preset

EPS = DiscreteProcess(cumulative_alphas())
STEPS = st.integers(1, 8)
DENOISE = st.floats(1e-9, 1.0)
modes = pytest.mark.parametrize("mode", DENOISE_MODES.values(), ids=DENOISE_MODES.keys())


def grids(steps):
    """A grid of each kind with the table it is interpolated in."""
    yield shifted_sigmas(steps, shift_alpha=3.0), None
    yield shifted_sigmas(steps, shift_alpha=1.0), None
    yield sigmas_at_timesteps(EPS, trailing_timesteps(steps)), EPS.sigmas
    yield sigmas_at_timesteps(EPS, turbo_timesteps(steps)), EPS.sigmas


@modes
@given(STEPS, DENOISE)
def test_never_empty_never_full_noise_always_falling(mode, steps, denoise):
    for grid, table in grids(steps):
        sigmas = mode(grid, denoise, table)
        assert len(sigmas) >= 2 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        assert sigmas.dtype == grid.dtype
        # Only as a noise level a denoise below 1 can be above all that a model of timesteps has: then it is the grid.
        above_all = mode is level_denoise and table is not None and denoise / (1 - min(denoise, 1 - 1e-9)) >= grid[0]
        if denoise < 1 - 1e-5 and not above_all:
            assert sigmas[0] < grid[0]


@given(STEPS, DENOISE, DENOISE)
def test_start_rises_with_denoise_and_is_the_same_in_both_modes(steps, a, b):
    low, high = min(a, b), max(a, b)
    for grid, table in grids(steps):
        start = lambda d: snap_denoise(grid, d, table)[0]  # noqa: B023, E731
        assert start(low) <= start(high)
        assert start(high) == respace_denoise(grid, high, table)[0]


@given(STEPS, st.floats(1e-3, 1.0 - 1e-4))
def test_start_is_continuous(steps, denoise):
    """A step of 1e-4 in denoise moves the start by at most the steepest trained interval times that step."""
    for grid, table in grids(steps):
        a, b = (snap_denoise(grid, d, table)[0].item() for d in (denoise, denoise + 1e-4))
        assert b - a < 1e-4 * steps * 8 * grid[0].item()


@modes
@pytest.mark.parametrize("steps", range(1, 9))
def test_denoise_one_is_the_grid_itself(mode, steps):
    for grid, table in grids(steps):
        assert torch.equal(mode(grid, 1.0, table), grid)


@pytest.mark.parametrize("steps", range(1, 9))
def test_whole_shares_snap_to_the_trained_levels_to_the_last_bit(steps):
    for grid, table in grids(steps):
        for left in range(1, steps + 1):
            assert torch.equal(snap_denoise(grid, left / steps, table), grid[steps - left :])


@given(STEPS, DENOISE)
def test_snap_walks_only_trained_levels_after_its_start(steps, denoise):
    for grid, table in grids(steps):
        sigmas = snap_denoise(grid, denoise, table)
        assert set(sigmas[1:].tolist()) <= set(grid.tolist())
        assert abs(len(sigmas) - 1 - max(1.0, steps * denoise)) <= 0.5 + 1e-5


@given(STEPS, DENOISE)
def test_respace_keeps_the_number_of_steps(steps, denoise):
    for grid, table in grids(steps):
        assert len(respace_denoise(grid, denoise, table)) == steps + 1


def test_one_step_of_a_flow_model_starts_at_denoise():
    grid = shifted_sigmas(1, shift_alpha=3.0)
    assert [snap_denoise(grid, d)[0].item() for d in (0.25, 0.5, 0.75)] == pytest.approx([0.25, 0.5, 0.75])


def test_discrete_grids_are_interpolated_in_timesteps():
    grid = sigmas_at_timesteps(EPS, [999])
    half = snap_denoise(grid, 0.5, EPS.sigmas)
    assert EPS.timestep(half[:1]).item() == pytest.approx(499, abs=1)


@pytest.mark.case("sampling 6", "image to image on schnell, denoise .5 of 4 steps, starts at half the noise")
def test_img2img_of_schnell():
    grid = preset_sigmas(find_preset("flux-schnell"), 4)
    assert snap_denoise(grid, 0.5).tolist() == pytest.approx([0.5, 0.25, 0])


def test_img2img_at_two_steps_of_four():
    grid = preset_sigmas(find_preset("sd3.5-large-turbo"))
    assert snap_denoise(grid, 0.5).tolist() == pytest.approx([0.75, 0.5, 0])
    assert respace_denoise(grid, 0.5).tolist() == pytest.approx([0.75, 0.625, 0.5, 0.25, 0])
    assert snap_denoise(grid, 0.6).tolist() == pytest.approx([0.81, 0.5, 0])


@modes
@pytest.mark.parametrize("denoise", [0.0, -0.1, 1.01, float("nan")])
def test_denoise_out_of_range(mode, denoise):
    with pytest.raises(ValueError, match="denoise must be above 0"):
        mode(shifted_sigmas(4, shift_alpha=1.0), denoise)


@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([], "at least one level"),
        ([0.0], "at least one level"),
        ([1.0, 0.5], "must end in 0"),
        ([0.5, 1.0, 0.0], "must fall"),
        ([1.0, 1.0, 0.0], "must fall"),
        ([float("inf"), 0.0], "finite"),
    ],
)
def test_unusable_sigmas(sigmas, message):
    with pytest.raises(ValueError, match=message):
        check_sigmas(torch.tensor(sigmas))


@given(STEPS, st.floats(1e-3, 0.9))
def test_a_noise_level_is_the_same_share_of_noise_on_every_grid(steps, denoise):
    for grid, table in grids(steps):
        sigmas = level_denoise(grid, denoise, table)
        share = sigmas[0] if table is None else sigmas[0] / (1 + sigmas[0])
        assert share.item() == pytest.approx(denoise, rel=1e-4)
        assert torch.equal(sigmas[1:], grid[len(grid) - len(sigmas) + 1 :]), "then trained levels only"


@pytest.mark.case(
    "sampling new 8 (leejet/stable-diffusion.cpp#1738)", "denoise can be the share of noise to start with"
)
def test_one_noise_level_on_models_whose_shares_of_steps_differ():
    """Half the steps start with 91 % noise on FLUX.2 klein and 84 % on SDXL-Turbo; half the noise is half the noise."""
    klein = preset_sigmas(find_preset("flux2-klein"))
    turbo = preset_sigmas(find_preset("sdxl-turbo"), process=EPS)
    assert snap_denoise(klein, 0.5)[0].item() == pytest.approx(0.908, abs=2e-3)
    assert level_denoise(klein, 0.5)[0].item() == 0.5
    assert snap_denoise(turbo, 0.5, EPS.sigmas)[0].item() == pytest.approx(5.088, abs=1e-3), "0.836 of noise"
    assert level_denoise(turbo, 0.5, EPS.sigmas).tolist() == pytest.approx([1.0, 0.0]), "below all trained levels"
    assert level_denoise(turbo, 0.8, EPS.sigmas).tolist() == pytest.approx([4.0, 0.0], rel=1e-4), "3.32 is too near"
    assert level_denoise(turbo, 0.88, EPS.sigmas).tolist() == pytest.approx([7.333, 5.088, 3.321, 0.0], rel=1e-3)
