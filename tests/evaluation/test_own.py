"""A student beside the teacher's own pictures: 0 and 1 where they are the same, and known numbers in between."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill_core.evaluation.intervals import Bootstrap
from distill_core.evaluation.own import distance_columns, image_columns, own_figures


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OWN = noise(100, 3, 32, 32)


def figures(images: torch.Tensor, latents: torch.Tensor = OWN[:, :, :8, :8]) -> dict[str, float]:
    columns = distance_columns(latents, OWN[:, :, :8, :8]), image_columns(images, OWN)
    return {name: figure.value for name, figure in own_figures(*columns, Bootstrap(100, repeats=0)).items()}


def test_the_same_picture():
    same = figures(OWN)
    assert same["drift"] == same["drift_pixels"] == 0
    assert same["coherence"] == pytest.approx(1) and same["detail_ratio"] == pytest.approx(1)
    assert same["detail_error"] == pytest.approx(0, abs=1e-6)


def test_another_picture_of_the_same_kind():
    other = figures(noise(100, 3, 32, 32, seed=1), noise(100, 3, 8, 8, seed=2))
    assert other["drift"] == pytest.approx(math.sqrt(2), rel=0.02)
    assert other["drift_pixels"] == pytest.approx(math.sqrt(2), rel=0.02)
    assert other["coherence"] == pytest.approx(0, abs=0.02) and other["detail_ratio"] == pytest.approx(1, abs=0.05)


def test_added_noise_raises_the_energy_and_lowers_the_coherence():
    """x + s n has 1 + s^2 of the energy, and 1 / sqrt(1 + s^2) of its detail in common with x."""
    noisy = figures(OWN + 0.5 * noise(100, 3, 32, 32, seed=1))
    assert noisy["detail_ratio"] == pytest.approx(1.25, rel=0.04)
    assert noisy["detail_error"] == pytest.approx(math.log(1.25), abs=0.04)
    assert noisy["coherence"] == pytest.approx(1 / math.sqrt(1.25), abs=0.01)
    assert noisy["drift_pixels"] == pytest.approx(0.5, rel=0.02)


def test_blur_lowers_the_energy_and_keeps_the_phase():
    """A symmetric filter with a positive response keeps the pictures' detail in phase, there is only less of it."""
    kernel = torch.tensor([1.0, 4.0, 1.0]) / 6
    weight = (kernel[:, None] * kernel[None]).expand(3, 1, 3, 3)
    blurred = figures(F.conv2d(F.pad(OWN, (1, 1, 1, 1), "circular"), weight, groups=3))
    assert blurred["detail_ratio"] < 0.6 and blurred["coherence"] > 0.9
    assert blurred["detail_error"] == pytest.approx(-math.log(blurred["detail_ratio"]), rel=1e-4)


def test_a_constant_offset_is_distance_but_no_detail():
    shifted = figures(OWN + 1.0, OWN[:, :, :8, :8] + 2.0)
    assert shifted["coherence"] == pytest.approx(1, abs=1e-4) and shifted["drift_pixels"] == pytest.approx(1, rel=0.02)
    assert shifted["drift"] == pytest.approx(2, rel=0.02)
