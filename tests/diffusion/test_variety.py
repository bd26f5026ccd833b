"""Seed variety's arithmetic (variety.py)."""

import pytest
import torch

from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.variety import PROMPT_NOISE, check_strength, noised_prompt, stronger_noise

EMBEDDING = 3 + 2 * ItemNoise(0, range(4)).normal(5, 64)


def test_a_noised_prompt_keeps_its_mean_and_spread():
    mixed = noised_prompt(EMBEDDING, ItemNoise(1, range(4)).normal(5, 64), 1.0)
    for moment in (torch.mean, torch.std):
        assert torch.allclose(moment(mixed.flatten(1), 1), moment(EMBEDDING.flatten(1), 1), atol=1e-4)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_its_share_of_noise_is_what_strength_says(strength):
    """Correlation with the prompt 1 / sqrt(1 + k^2) for noise of k times its spread."""
    many = ItemNoise(2, range(64)).normal(8, 64)
    mixed = noised_prompt(many, ItemNoise(3, range(64)).normal(8, 64), strength)
    correlation = torch.corrcoef(torch.stack([many.flatten(), mixed.flatten()]))[0, 1].item()
    assert correlation == pytest.approx((1 + (strength * PROMPT_NOISE) ** 2) ** -0.5, abs=0.01)


def test_rows_do_not_depend_on_each_other():
    noise = ItemNoise(1, range(4)).normal(5, 64)
    whole = noised_prompt(EMBEDDING, noise, 0.7)
    assert torch.equal(whole[2:3], noised_prompt(EMBEDDING[2:3], noise[2:3], 0.7))


def test_strength_nought_changes_nothing():
    noise = ItemNoise(1, range(4)).normal(5, 64)
    assert torch.allclose(noised_prompt(EMBEDDING, noise, 0.0), EMBEDDING, atol=1e-5)
    assert torch.equal(stronger_noise(EMBEDDING, 0.0), EMBEDDING)
    assert stronger_noise(EMBEDDING, 1.0).std() / EMBEDDING.std() == pytest.approx(1.1)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_other_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="from 0 to 1"):
        check_strength(strength)
