import math

import perceptual_reference as reference
import pytest
import torch

from distill_core.diffusion.noise import ItemNoise
from distill_core.perceptual import transforms
from distill_core.perceptual.transforms import PRESETS, SYM6, Warp, draw, geometry, transform

SIZES = [(8, 8), (9, 6), (5, 12)]


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_filter_is_an_orthogonal_wavelet_with_six_vanishing_moments():
    """sum h = sqrt 2; <h, h shifted by 2 m> = 0; the high pass (-1)^k h kills polynomials up to degree 5."""
    h = torch.tensor(SYM6, dtype=torch.float64)
    assert h.sum().item() == pytest.approx(math.sqrt(2))
    for m in range(6):
        product = (h[: len(h) - 2 * m] * h[2 * m :]).sum().item()
        assert product == pytest.approx(1.0 if m == 0 else 0.0, abs=1e-9)
    k = torch.arange(12, dtype=torch.float64)
    for power in range(6):
        assert abs(((-1) ** k * h * (k - 5.5) ** power).sum().item()) < 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_every_item_equals_the_reference(preset, size):
    d, x = draw(ItemNoise(3, range(3))), latents(3, 4, *size)
    found = transform(d, preset, *size)(x)
    for i in range(3):
        expected = reference.transformed(x[i], d.named(), i, preset)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)


def test_a_strong_reduction_ends_in_zeros_where_one_reflection_does_not_reach():
    d = draw(ItemNoise(0, range(2)))
    d.scale[:] = torch.tensor([-2.0, 0.0])
    x = latents(2, 3, 6, 7)
    found = transform(d, "bg", 6, 7)(x)
    for i in range(2):
        torch.testing.assert_close(found[i], reference.transformed(x[i], d.named(), i, "bg"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_an_item_does_not_depend_on_its_batch(preset):
    x = latents(5, 4, 10, 7)
    whole = transform(draw(ItemNoise(1, range(5))), preset, 10, 7)(x)
    for i in range(5):
        alone = transform(draw(ItemNoise(1, [i])), preset, 10, 7)(x[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-12)


def test_identity_and_whole_shifts_are_exact():
    """The wavelet is orthogonal, so up- and down-sampling alone lose nothing."""
    x = latents(2, 3, 10, 14)
    shift = torch.tensor([[2.0, 0.0], [0.0, -3.0]], dtype=torch.float64)
    assert (Warp(torch.eye(3).double().expand(2, 3, 3), 10, 14)(x) - x).abs().max() < 1e-10
    moved = Warp(transforms._translate(shift[:, 0], shift[:, 1]), 10, 14)(x)
    assert (moved[0, :, :, 2:] - x[0, :, :, :-2]).abs().max() < 1e-10
    assert (moved[1, :, :-3] - x[1, :, 3:]).abs().max() < 1e-10


def test_a_quarter_turn_of_a_smooth_image_is_that_of_rot90():
    x = torch.nn.functional.interpolate(latents(1, 2, 3, 3), size=24, mode="bicubic")
    d = draw(ItemNoise(0, [0]))
    d.flip[:], d.turns[:], d.shift[:] = 1, 1, 0
    assert (transform(d, "b", 24, 24)(x) - x.rot90(1, (2, 3))).abs().max() < 0.15 * x.abs().max()
    assert (x - x.rot90(1, (2, 3))).abs().max() > 0.5 * x.abs().max()


def test_draws_have_the_published_ranges():
    d = draw(ItemNoise(0, range(4000)))
    assert set(d.flip.tolist()) == {-1.0, 1.0} and set(d.turns.tolist()) == {0.0, 1.0, 2.0, 3.0}
    for value, low, high in (
        (d.shift, -0.125, 0.125),
        (d.angle_before, -math.pi, math.pi),
        (d.angle_after, -math.pi, math.pi),
        (d.brightness, -0.5, 0.5),
        (d.contrast, 0.5, 1.5),
        (d.saturation, 0, 2),
        (d.box, 0, 1),
    ):
        assert low <= value.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < value.max() <= high
    for value, deviation in ((d.scale, 0.2), (d.stretch, 0.2), (d.move, 0.125)):
        assert value.std().item() == pytest.approx(deviation, rel=0.05) and abs(value.mean()) < 0.02 * 3


def test_b_is_the_b_part_of_bg():
    d = draw(ItemNoise(5, range(4)))
    d.scale[:] = d.stretch[:] = d.angle_before[:] = d.angle_after[:] = d.move[:] = 0
    torch.testing.assert_close(geometry(d, 8, 10, "bg"), geometry(d, 8, 10, "b"), rtol=0, atol=0)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="'xyz'"):
        transform(draw(ItemNoise(0, [0])), "xyz", 8, 8)


@pytest.mark.case("methods A.2", "the published metric's presets g, c, o and co are there, each letter on its own")
def test_each_letter_stands_alone():
    d, x = draw(ItemNoise(7, range(3))), latents(3, 4, 8, 10)
    b, g = (geometry(d, 8, 10, preset) for preset in "bg")
    torch.testing.assert_close(g @ b, geometry(d, 8, 10, "bg"))
    coloured, boxed = transform(d, "c", 8, 10)(x), transform(d, "o", 8, 10)(x)
    kept = boxed != 0
    assert torch.equal(boxed[kept], x[kept]) and 0 < kept.float().mean() < 1  # no resampling where nothing moves
    assert torch.equal(transform(d, "co", 8, 10)(x), torch.where(kept, coloured, 0.0))
