"""The program that draws scenes: an item is its own, an edit changes what its word says and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.data.scenes import COLOURS, DRAWS, GROUPS, SIZE, draw_rows, draw_words, render

SUMS = (-202526.670, 46717.246)  # of 64 pictures and of their masks
COUNTS = [len(group) for group in GROUPS.values()]
WORDS = st.tuples(*(st.integers(0, count - 1) for count in COUNTS))


def test_a_scene_is_the_same_alone_and_in_a_batch():
    words, rows = draw_words(5, range(6)), draw_rows(5, range(6))
    together, masks = render(words, rows)
    alone, mask = render(draw_words(5, [4]), draw_rows(5, [4]))
    assert together.shape == (6, 3, SIZE, SIZE) and masks.shape == (6, 1, SIZE, SIZE)
    torch.testing.assert_close(alone[0], together[4], rtol=0, atol=1e-6)
    torch.testing.assert_close(mask[0], masks[4], rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(WORDS, st.integers(0, 10_000))
def test_every_picture_is_in_range_and_shows_an_object(words, item):
    picture, mask = render(torch.tensor([words]), draw_rows(1, [item]))
    assert picture.isfinite().all() and picture.abs().max() <= 1
    assert 0 <= mask.min() and mask.max() == 1
    assert 0.02 < mask.mean() < 0.5


@settings(max_examples=30, deadline=None)
@given(WORDS, st.sampled_from(["texture", "colour"]), st.integers(0, 10_000))
def test_texture_and_colour_change_the_object_only(words, group, item):
    index = list(GROUPS).index(group)
    other = list(words)
    other[index] = (other[index] + 1) % COUNTS[index]
    pictures, masks = render(torch.tensor([words, other]), draw_rows(2, [item]).expand(2, -1))
    assert torch.equal(masks[0], masks[1])
    changed = (pictures[0] - pictures[1]).abs().amax(0)
    assert changed[masks[0, 0] == 0].max() == 0
    assert changed[masks[0, 0] == 1].max() > 0.2


@settings(max_examples=30, deadline=None)
@given(WORDS, st.integers(0, 10_000))
def test_the_ground_changes_outside_the_object_only(words, item):
    other = (*words[:3], 1 - words[3])
    pictures, masks = render(torch.tensor([words, other]), draw_rows(3, [item]).expand(2, -1))
    changed = (pictures[0] - pictures[1]).abs().amax(0)
    assert changed[masks[0, 0] == 1].max() == 0
    assert changed[masks[0, 0] == 0].mean() > 0.05


def test_objects_have_the_colour_that_is_asked_for():
    for index, name in enumerate(COLOURS):
        words = torch.tensor([[0, index, 0, 0]]).expand(20, -1)
        pictures, masks = render(words, draw_rows(4, range(20)))
        r, g, b = ((pictures * masks).sum((0, 2, 3)) / masks.sum()).tolist()
        dominant = {
            "red": r > max(g, b) + 0.5,
            "yellow": min(r, g) > b + 0.5,
            "green": g > max(r, b) + 0.3,
            "blue": b > max(r, g) + 0.3,
            "white": max(r, g, b) - min(r, g, b) < 0.2,
        }
        assert dominant[name], (name, r, g, b)


def test_the_pictures_have_fine_detail():
    """Three percent of the energy lies above half the Nyquist frequency; the clothes have 0.23 %."""
    pictures, _ = render(draw_words(6, range(64)), draw_rows(6, range(64)))
    grey = pictures.mean(1)
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    frequency = torch.fft.fftfreq(SIZE).abs()
    fine = torch.maximum(frequency[:, None], frequency[None]) > 0.25
    assert power[fine].sum() / power.sum() > 0.025


def test_words_are_drawn_from_the_combinations_that_are_allowed():
    allowed = torch.tensor([[0, 1, 2, 1], [2, 4, 3, 0]])
    words = draw_words(7, range(200), allowed)
    assert {tuple(row) for row in words.tolist()} == {(0, 1, 2, 1), (2, 4, 3, 0)}
    everything = draw_words(7, range(3000))
    assert len({tuple(row) for row in everything.tolist()}) == torch.tensor(COUNTS).prod()


def test_the_shipped_models_pictures_never_change():
    """They, and all that was trained and judged on them, are of these very bits."""
    picture, mask = render(draw_words(5, range(64)), draw_rows(5, range(64)))
    assert picture.double().sum().item() == pytest.approx(SUMS[0], abs=0.05)
    assert mask.double().sum().item() == pytest.approx(SUMS[1], abs=0.05)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (200, 72)])
def test_other_sizes_show_the_same_scene_and_more_of_its_ground(size):
    words, rows = draw_words(5, range(12)), draw_rows(5, range(12))
    (picture, mask), (wide, wide_mask) = render(words, rows), render(words, rows, size)
    assert wide.shape == (12, 3, *reversed(size)) and wide.abs().max() <= 1
    left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    middle = [x[:, :, top : top + SIZE, left : left + SIZE] for x in (wide, wide_mask)]
    torch.testing.assert_close(middle[1], mask, rtol=0, atol=1e-4)
    assert wide_mask.sum().item() == pytest.approx(mask.sum().item(), abs=1e-2)
    apart = (middle[0] - picture).abs().amax(1)  # a stone that begins outside may reach in at an edge
    assert (apart[:, 12:-12, 12:-12] > 1e-3).float().mean() < 0.01
    for side in (wide[..., :8], wide[..., -8:], wide[:, :, :8], wide[:, :, -8:]):
        assert (side.std((2, 3)) > 0.03).any(1).all()  # there is ground everywhere


def test_a_scene_that_its_object_does_not_fit_into_is_refused():
    with pytest.raises(ValueError, match="sides of at least 64 pixels"):
        render(draw_words(0, [0]), draw_rows(0, [0]), (96, 32))


@pytest.mark.parametrize(
    "words, rows, match",
    [
        (torch.zeros(2, 3, dtype=torch.long), torch.rand(2, DRAWS), "words must be"),
        (torch.zeros(2, 4, dtype=torch.long), torch.rand(3, DRAWS), "rows"),
        (torch.tensor([[0, 5, 0, 0]]), torch.rand(1, DRAWS), "out of range"),
        (torch.tensor([[0, -1, 0, 0]]), torch.rand(1, DRAWS), "out of range"),
    ],
)
def test_wrong_words_and_rows_are_refused(words, rows, match):
    with pytest.raises(ValueError, match=match):
        render(words, rows)
