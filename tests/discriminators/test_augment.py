"""Augmentation of the discriminator's view: geometry, gradients, and draws that belong to their item."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.diffusion.noise import ItemNoise
from distill_core.discriminators.augment import KINDS, Augmentation, cutout, flip, translation

kinds = st.lists(st.sampled_from(sorted(KINDS)), unique=True)


@given(kinds, st.integers(1, 5), st.integers(1, 17), st.integers(1, 17), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_shapes_stay_and_every_value_is_one_of_its_item_or_zero(chosen, batch, height, width, seed):
    x = torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(seed))
    y = Augmentation(chosen, ItemNoise(seed, range(batch)))(x)
    assert y.shape == x.shape
    for before, after in zip(x, y, strict=True):
        for channel, changed in zip(before, after, strict=True):
            assert torch.isin(changed[changed != 0], channel).all()
    if not chosen:
        assert torch.equal(x, y)


@given(kinds.filter(bool), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_an_item_is_changed_alike_alone_and_in_a_batch_and_twice(chosen, seed):
    x = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
    together = Augmentation(chosen, ItemNoise(seed, range(4)))
    alone = Augmentation(chosen, ItemNoise(seed, [2]))
    assert torch.equal(together(x)[2:3], alone(x[2:3])) and torch.equal(together(x), together(x))


def test_translation_moves_by_up_to_an_eighth():
    x = torch.arange(1.0, 65).view(1, 1, 8, 8)
    moved = {(a, b): translation(x, torch.tensor([[a], [b]])) for a in (0.0, 0.5, 0.99) for b in (0.0, 0.5, 0.99)}
    assert torch.equal(moved[0.5, 0.5], x)
    up = moved[0.99, 0.5]
    assert torch.equal(up[..., 1:, :], x[..., :-1, :]) and not up[..., 0, :].any()
    left = moved[0.5, 0.0]
    assert torch.equal(left[..., :-1], x[..., 1:]) and not left[..., -1].any()


def test_cutout_covers_a_quarter_at_most_and_flip_half_of_the_items():
    x = torch.ones(1, 1, 8, 8)
    assert (cutout(x, torch.tensor([[0.5], [0.5]])) == 0).sum() == 16
    assert (cutout(x, torch.tensor([[0.0], [0.0]])) == 0).sum() == 4  # its middle is the corner
    y = torch.randn(2, 1, 3, 4)
    assert torch.equal(flip(y, torch.tensor([[0.4, 0.6], [0.0, 0.0]])), torch.stack([y[0].flip(2), y[1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Augmentation([kind], ItemNoise(1, range(2))), x)
