"""Datasets of another family or model are refused in a sentence before anything is computed."""

from __future__ import annotations

import pytest
import toy

from distill_core.data.fits import check_fits, check_teacher
from distill_core.models.denoiser import Limits

FITS = dict(channels=toy.CHANNELS, context=toy.CONTEXT, pooled=toy.POOLED, side=6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy.cache_toy(tmp_path_factory.mktemp("data"), {"base": "mine"})


def test_a_dataset_that_fits_passes(dataset):
    check_fits(dataset, Limits(**FITS))
    check_fits(dataset, Limits())
    check_teacher(dataset, "mine")


@pytest.mark.case("training D10", "text of another encoder and sides beyond the position table are refused in words")
@pytest.mark.case("training D7", "a dataset of another family is refused in a sentence")
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (dict(channels=16), "has latents of 4 channels, this model's have 16"),
        (dict(context=64), "has text tokens of width 8, this model takes 64"),
        (dict(pooled=64), "has a pooled text of width 6, this model takes 64"),
        (dict(side=4), "has latents of 6 x 4, and this model knows no position beyond 4: .* at most 32 pixels"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(dataset, limits, message):
    with pytest.raises(ValueError, match=message):
        check_fits(dataset, Limits(**{**FITS, **limits}))


def test_a_dataset_without_pooled_text_says_so(tmp_path):
    cond, _ = toy.toy_conds()
    import torch

    from distill_core.data.dataset import LatentDataset
    from distill_core.data.real import save_latents
    from distill_core.models.denoiser import Cond

    bare = Cond(cond.context)
    save_latents([torch.randn(toy.CHANNELS, 4, 6)], [bare[:1]], bare[:1], tmp_path)
    with pytest.raises(ValueError, match="has no pooled text, this model takes 6"):
        check_fits(LatentDataset(tmp_path), Limits(**FITS))


def test_pairs_of_another_teacher_are_refused_and_pictures_are_not(dataset, tmp_path):
    with pytest.raises(ValueError, match="its base is mine, this one is yours"):
        check_teacher(dataset, "yours")
    check_teacher(toy.cache_toy(tmp_path / "pictures", {"base": "mine"}, state_sigmas=()), "yours")
    check_teacher(toy.cache_toy(tmp_path / "unsaid"), "yours")
