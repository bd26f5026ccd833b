"""Batches by tokens: a bucket of small latents gets more items a step than one of large ones."""

from __future__ import annotations

import pytest
import torch
from test_loop import assert_equal_states, finish
from toy import CHANNELS, cache_toy, toy_run

from distill_core.data.buckets import spell
from distill_core.data.epochs import ByTokens
from distill_core.data.mix import MixedDataset, new_mix
from distill_core.methods.ladd import LADDConfig
from distill_core.models.denoiser import Limits
from distill_core.training.loop import train
from distill_core.training.loop_config import TrainConfig
from distill_core.training.preflight import preflight
from distill_core.training.validation import Validation

SIZES = ((4, 6), (8, 6))  # 24 and 48 tokens


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"), count=32, sizes=SIZES)


def test_a_size_fills_the_tokens_and_is_shared_out_evenly():
    sizes = [ByTokens(1024, Limits(patch=2), processes).of(32, 32) for processes in (1, 2, 3, 8)]
    assert sizes == [4, 4, 3, 8]  # no process goes without
    assert ByTokens(96, Limits()).of(4, 6) == 4 and ByTokens(96, Limits()).of(8, 6) == 2
    assert ByTokens(47, Limits()).of(8, 6) == 1 and Limits(patch=2).tokens(5, 7) == 12
    assert TrainConfig().batches(Limits()) == 4 and TrainConfig(tokens_per_batch=9).batches(Limits()) == ByTokens(
        9, Limits()
    )


def test_an_epoch_has_every_item_once(dataset):
    size = ByTokens(96, Limits())
    batches = [dataset.items_of(number, size, seed=3) for number in range(12)]  # 16 / 4 and 16 / 2
    assert sorted(map(len, batches)) == [2] * 8 + [4] * 4
    assert len({item for batch in batches for item in batch}) == 32
    assert dataset.items_of(12, size, seed=3) != batches[0]
    assert (
        len({dataset.batch(number, size, 3).latents[0].numel() * len(batch) for number, batch in enumerate(batches)})
        == 1
    )


def test_items_have_noise_of_their_own(dataset):
    run = toy_run(dataset, tokens_per_batch=96)
    seen = []
    for run.step in range(12):
        batch, random = run.batch(0)
        assert len(random.items) == len(batch.latents)
        seen += random.items
    assert len(set(seen)) == len(seen) == 32


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_ends_bit_equal(dataset, tmp_path, accumulation):
    changes = dict(tokens_per_batch=96, accumulation=accumulation, ladd=LADDConfig(reference_tokens=24), steps=8)
    whole = finish(toy_run(dataset, tmp_path / "whole", **changes))
    for event in train(toy_run(dataset, tmp_path / "parts", **changes)):
        if event.step == 3:
            break
    resumed = finish(toy_run(dataset, tmp_path / "parts", **changes))
    assert_equal_states(resumed, whole)


def test_a_mix_is_batched_likewise(dataset, tmp_path):
    other = cache_toy(tmp_path, count=8, sizes=((2, 6),))
    mixed = MixedDataset(new_mix({dataset.folder: 1.0, other.folder: 1.0}))
    counts = {len(mixed.items_of(number, ByTokens(96, Limits()), 0)) for number in range(24)}
    assert counts == {2, 4, 8}


def test_the_checks_before_a_run_look_at_the_smallest_batch(dataset):
    with pytest.raises(ValueError, match="hinge with a batch of 1"):
        preflight(toy_run(dataset, tokens_per_batch=48))
    preflight(toy_run(dataset, tokens_per_batch=96))


def test_what_is_held_out_is_measured_in_both_sizes(dataset):
    run = toy_run(dataset, tokens_per_batch=96, validation=8.0, ladd=LADDConfig(reference_tokens=24))
    batches = [tuple(batch.latents.shape[1:]) for batch, _ in Validation(run)._batches()]
    assert {(CHANNELS, *size) for size in SIZES} == set(batches)
    assert torch.tensor(Validation(run).figures()["validation"]).isfinite()


def test_pictures_are_told_how_often_they_come():
    row = {"width": 64, "height": 96, "pictures": 3, "cropped_most": 0, "upscaled": 0}
    said = {"buckets": [row], "files": {}, "left_out": {}}
    assert "each comes 4 times an epoch at batch_size 12" in spell(said, ByTokens(1152, Limits()))
