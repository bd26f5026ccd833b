"""Presets as evidence: each row's maker's scheduler is run, and gives the levels of the row."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.ltx2 import utils as ltx2
from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import logsnr_sigma_schedule

from distill_core.diffusion.schedules import shifted_sigmas
from distill_core.presets.levels import flux2_mu, flux_mu, preset_sigmas
from distill_core.presets.reference import HOST, disagreement, reference_sigmas, unsupported
from distill_core.presets.table import find_preset, presets

ROWS = list(presets().values())
RUN = [row for row in ROWS if row.reference is not None and row.reference["scheduler"] != HOST]


def name(row):
    return row.key


@pytest.mark.parametrize("row", RUN, ids=name)
def test_the_levels_are_those_of_the_makers_scheduler(row):
    assert max(disagreement(row, steps) for steps in row.steps) < 1e-3


@pytest.mark.parametrize("side", [512, 768, 1040, 1536, 2048])
@pytest.mark.parametrize("key", ["flux1-turbo-alpha", "flux2-klein", "qwen-image-2.1-lightning"])
def test_levels_that_depend_on_the_size_do_as_their_reference(key, side):
    row = find_preset(key)
    ours = preset_sigmas(row, row.default_steps, None, side, side)
    assert (ours - reference_sigmas(row, row.default_steps, side, side)).abs().max() < 1e-3


def test_every_row_with_levels_has_a_reference_and_a_date():
    for row in ROWS:
        assert (row.reference is not None) == row.known, row.key
        assert not row.known or row.checked >= "2026-11-26"
    assert len(RUN) >= 45


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 4225, 4300, 4356, 9216, 16384])
def test_the_formulas_of_mu_are_the_pipelines(tokens):
    """reference.py computes mu by our formulas; they are held to the pipelines' own."""
    assert flux_mu(tokens) == pytest.approx(calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    assert flux_mu(tokens, 0.5, 0.9, 8192) == pytest.approx(calculate_shift(tokens, 256, 8192, 0.5, 0.9))
    for steps in (4, 8, 50):
        assert flux2_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_a_wrong_list_disagrees():
    """The test can fail: the list of FLUX.2 dev Turbo's card, taken for what the network sees, is half a unit off."""
    row = find_preset("flux2-dev-turbo-lora")
    card = torch.tensor([*row.reference["sigmas"], 0.0])
    assert (card - reference_sigmas(row, 8)).abs().max() > 0.5


@pytest.mark.case("sampling D1", "FLUX.2 dev Turbo's levels are what its scheduler makes of the card's list")
@pytest.mark.case("sampling 1", "its levels are those of shift 3, and embedded guidance 2.5 is examined")
def test_flux2_dev_turbo_is_shift_3():
    row = find_preset("flux2-dev-turbo-lora")
    even = torch.linspace(1, 0.001, 8)
    expected = 3 * even / (1 + 2 * even)
    assert (preset_sigmas(row)[:-1] - expected).abs().max() < 1e-3
    assert row.guidance == 2.5 and row.guidance_input


@pytest.mark.case("sampling D8", "Qwen-Image-2.1 Lightning's shift grows with the picture, as its card says")
@pytest.mark.case("sampling 3", "1, .857, .667, .4 at 1024 x 1024 and 1, .918, .788, .553 at 2048 x 2048")
def test_qwen_image_21_lightning():
    row = find_preset("qwen-image-2.1-lightning")
    assert preset_sigmas(row).tolist() == pytest.approx([1, 0.857, 0.667, 0.4, 0], abs=2e-3)
    assert preset_sigmas(row, 4, None, 2048, 2048).tolist() == pytest.approx([1, 0.918, 0.788, 0.553, 0], abs=2e-3)
    assert row.confidence == "B"


@pytest.mark.case("sampling D15", "flash-sd runs LCM's timesteps, and ERNIE-Image-Turbo has both lists in use")
def test_flash_sd_and_ernie():
    assert preset_sigmas(find_preset("flash-sd")).tolist() == preset_sigmas(find_preset("lcm-lora")).tolist()
    for key, alpha in (("ernie-image-turbo", 3.0), ("ernie-image-turbo-diffusers", 4.0)):
        assert preset_sigmas(find_preset(key)).tolist() == pytest.approx(shifted_sigmas(8, shift_alpha=alpha).tolist())


@pytest.mark.case("sampling D7", "MiniMax-H3's 768p LoRAs have a row: video shift 6, sound 3, 4 or 8 steps")
def test_minimax_768p():
    row = find_preset("minimax-h3-turbo-768p")
    assert row.audio_shift == 3 and row.steps == (4, 8)
    assert preset_sigmas(row, 4).tolist() == pytest.approx(shifted_sigmas(4, shift_alpha=6.0).tolist())


def test_published_lists_are_the_libraries_own():
    lists = {
        "ltx2-distilled": ltx2.DISTILLED_SIGMA_VALUES,
        "ltx2-stage-2": ltx2.STAGE_2_DISTILLED_SIGMA_VALUES,
        "ltx2-temporal": ltx2.TEMPORAL_ROUND_DISTILLED_SIGMA_VALUES,
        "stable-audio-3-medium": logsnr_sigma_schedule(8, -6.2, 2.0),
    }
    for key, levels in lists.items():
        assert preset_sigmas(find_preset(key)).tolist() == pytest.approx([*levels, 0.0], abs=1e-5), key


def test_what_a_row_lacks_is_said():
    assert unsupported(find_preset("flux-schnell")) == []
    assert unsupported(find_preset("z-image-tdm-r1")) == ["no second source", "not read at the author's"]
    assert "levels not known" in unsupported(find_preset("rcm-wan"))
