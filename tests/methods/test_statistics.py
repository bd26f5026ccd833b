"""Repeats that fill up a batch, and items that are not the student's, enter no statistic of any method."""

import pytest
import torch
from toy import TERMS, cache_toy, toy_method, toy_run

from distill_core.data.dataset import LatentDataset, same_rows
from distill_core.diffusion.noise import ItemNoise
from distill_core.training.loop import train, training_step

STATISTICS = ("accuracy", "logit_gap", "logit_spread", "diversity", "spread")


def few(tmp_path, count: int, **changes) -> LatentDataset:
    """A toy dataset of a few items."""
    return cache_toy(tmp_path / f"few-{count}", count=count, shard_size=max(1, count), **changes)


def test_repeats_are_found_whether_an_item_or_its_picture_comes_again():
    latents = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert same_rows(latents) == (0, 1, 2)
    assert same_rows(latents[[0, 1, 0, 2, 1, 0]]) == (0, 1, 0, 3, 1, 0)


@pytest.mark.case("training D1", "a batch filled up with repeats is judged by each item once")
@pytest.mark.parametrize("terms", TERMS)
def test_a_batch_filled_up_is_judged_by_each_item_once(tmp_path, terms):
    """Of 3 items in a batch of 8, the statistics are those of the first three rows alone."""
    dataset = few(tmp_path, 3)
    batch = dataset.batch(0, 8, 0)
    assert batch.same == (0, 1, 2, 0, 1, 2, 0, 1) and batch.distinct == [0, 1, 2]
    method = toy_method(dataset, TERMS[terms])
    step = method.start(batch, ItemNoise(0, range(8)), 9)
    logs = method.generator_loss(step)[1]
    fake, real = step.fake[:3].detach(), batch.latents[:3]
    assert logs["spread"] == pytest.approx(fake.std(0).mean().item())
    assert logs["diversity"] == pytest.approx((fake.std(0).mean() / real.std(0).mean()).item())
    assert 0.05 < logs["diversity"] < 20


@pytest.mark.case("training D1", "a batch of one distinct item has no diversity")
@pytest.mark.parametrize("terms", TERMS)
def test_a_batch_of_one_distinct_item_has_no_spread(tmp_path, terms):
    logs = training_step(toy_run(few(tmp_path, 1), ladd=TERMS[terms], accumulation=2))
    assert not {"diversity", "spread", "logit_spread"} & logs.keys()


def test_buckets_of_one_item_do_not_dilute_the_others_of_a_step(tmp_path):
    """Sizes of 4 and of 1 items take turns in the micro-batches of one step."""
    sizes = ((4, 6), (6, 4))
    dataset = cache_toy(tmp_path / "mixed", count=5, shard_size=4, sizes=sizes)
    alone = [row.same == (0, 0, 0, 0) for row in (dataset.batch(number, 4, 0) for number in range(2))]
    assert sorted(alone) == [False, True]
    logs = training_step(toy_run(dataset, accumulation=2))
    assert 0.05 < logs["diversity"] < 20 and "logit_spread" in logs


@pytest.mark.case("methods B10", "Diffusion2GAN's statistics leave the mix-and-match items out")
def test_mismatched_targets_are_no_outputs_of_the_student(tmp_path, monkeypatch):
    from distill_core.methods import diffusion2gan as module

    dataset, seen = few(tmp_path, 8), []
    monkeypatch.setattr(module, "discriminator_health", lambda fake, real: seen.append((len(fake), len(real))) or {})
    method = toy_method(dataset, TERMS["diffusion2gan"])
    for number in range(6):
        step = method.start(dataset.batch(number, 8, 0), ItemNoise(0, range(8 * number, 8 * number + 8)), 1)
        method.discriminator_loss(step)
        assert seen[-1] == (8 - int(step.swapped.sum()), 8)
        same = (step.mixed == step.fake).flatten(1).all(1)
        assert torch.equal(same, ~step.swapped)
    assert len({fakes for fakes, _ in seen}) > 1


@pytest.mark.case("methods B10", "a repeated item is never shown as its own mismatch")
def test_a_repeated_item_is_no_mismatch_of_itself(tmp_path):
    dataset = few(tmp_path, 1)
    method = toy_method(dataset, TERMS["diffusion2gan"])
    for number in range(6):
        step = method.start(dataset.batch(number, 8, 0), ItemNoise(0, range(8 * number, 8 * number + 8)), 1)
        assert not step.swapped.any()


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_few_items_of_mixed_sizes_train_to_the_end(tmp_path, terms, count):
    """One item a shard, sizes in turn: most buckets are smaller than the batch."""
    sizes = ((4, 6), (6, 4), (4, 4), (6, 6), (4, 8))
    dataset = cache_toy(tmp_path / "few", count=count, shard_size=1, sizes=sizes)
    events = list(train(toy_run(dataset, ladd=TERMS[terms], steps=12)))
    assert len(events) == 12
    assert all(event.logs.get("diversity", 1.0) < 100 for event in events)
