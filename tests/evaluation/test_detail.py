"""Detail of pictures, against what theory says of noise, waves and blur."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill_core.evaluation.detail import BANDS, FINE, cross_energies, detail_columns, detail_figures, grey
from distill_core.evaluation.intervals import Bootstrap


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 64), (48, 65)])
def test_white_noise_has_its_variance_spread_over_the_plane(size):
    """Rings share it by their areas: up to radius r (of Nyquist) lies pi r^2 / 4 of the square."""
    energies = cross_energies(*[0.5 * noise(200, *size)] * 2).mean(0)
    assert energies.sum().item() == pytest.approx(0.25, rel=0.03)
    for ring in range(1, BANDS - 1):
        share = math.pi / 4 * ((ring + 1) ** 2 - ring**2) / BANDS**2
        assert energies[ring].item() == pytest.approx(0.25 * share, rel=0.15)


@pytest.mark.parametrize("cycles, ring", [(6, 1), (14, 3), (22, 5), (30, 7)])
def test_a_wave_is_in_its_ring(cycles, ring):
    wave = torch.sin(2 * math.pi * cycles / 64 * torch.arange(64.0)).expand(1, 64, 64)
    energies = cross_energies(wave, wave)[0]
    assert energies.argmax() == ring and energies[ring] > 0.95 * energies.sum()
    assert energies.sum().item() == pytest.approx(0.5, rel=0.02)  # a sine's variance


def test_columns_against_sums_over_pixels():
    images = noise(2, 3, 9, 8)
    x = images.mean(1).double()
    columns = detail_columns(images)
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * x[:, 1:-1, 1:-1]
    across = (x[:, :, 2:] - x[:, :, :-2]) / 2
    down = (x[:, 2:] - x[:, :-2]) / 2
    across = (across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) / 4
    down = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 4
    expected = [across.square() + down.square(), laplacian.square(), laplacian.pow(4)]
    for column, values in zip(columns.T[BANDS:], expected, strict=True):
        torch.testing.assert_close(column.double(), values.mean((1, 2)), atol=1e-5, rtol=1e-5)


def figures(images: torch.Tensor) -> dict[str, float]:
    return {k: f.value for k, f in detail_figures(detail_columns(images), Bootstrap(len(images), repeats=0)).items()}


def test_blur_loses_detail_and_edges_and_noise_is_not_heavy_tailed():
    """Pictures of random rectangles, as they are, blurred, and with noise on top."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(40, 3, 64, 64)
    for picture in pictures:
        for _ in range(4):
            (top, left), value = (
                torch.randint(0, 40, (2,), generator=generator).tolist(),
                torch.rand(1, generator=generator),
            )
            picture[:, top : top + 20, left : left + 14] = value.item()
    sharp, blurred = figures(pictures), figures(F.avg_pool2d(pictures, 3, 1, 1))
    noisy = figures(pictures + 0.3 * noise(40, 3, 64, 64))
    assert blurred["detail"] < 0.2 * sharp["detail"] and blurred["edges"] < 0.7 * sharp["edges"]
    assert noisy["detail"] > sharp["detail"] and noisy["kurtosis"] < 0.3 * sharp["kurtosis"]
    assert figures(noise(40, 1, 64, 64))["kurtosis"] == pytest.approx(3, abs=0.05)


def test_detail_is_the_energy_above_half_of_nyquist():
    images = noise(30, 3, 32, 32)
    expected = cross_energies(grey(images), grey(images))[:, FINE].sum(1).mean().item()
    assert figures(images)["detail"] == pytest.approx(expected, rel=1e-5)
    smooth = F.interpolate(noise(30, 3, 8, 8), size=(32, 32), mode="bicubic")
    assert figures(smooth)["detail"] < 0.02 * figures(images)["detail"]
