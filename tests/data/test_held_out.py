import pytest
import torch
from toy import cache_toy

from distill_core.data.dataset import LatentDataset
from distill_core.data.held_out import hold_out
from distill_core.files import load_tensors, save_tensors


def items_of(dataset: LatentDataset) -> set:
    return {item for bucket in dataset.buckets.values() for item in bucket}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """16 items of two sizes."""
    return cache_toy(tmp_path_factory.mktemp("data"), sizes=((4, 6), (4, 4)))


@pytest.mark.parametrize(("amount", "count"), [(0.25, 4), (3, 3), (1, 1), (0.01, 1), (14, 14)])
def test_a_share_or_a_number_is_held_out_and_in_no_batch(dataset, amount, count):
    training, held_out = hold_out(dataset, amount, seed=1)
    assert len(held_out) == count and len(training) == 16 - count
    assert items_of(training) | items_of(held_out) == items_of(dataset) and not items_of(training) & items_of(held_out)
    drawn = [training.epochs._epoch(epoch, 2, 0) for epoch in range(8)]
    assert {item for epoch in drawn for batch in epoch for item in batch} == items_of(training)
    assert training.shapes == dataset.shapes  # every size keeps one to train on


def test_the_seed_decides_which(dataset):
    chosen = [items_of(hold_out(dataset, 4, seed)[1]) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1] and len({frozenset(items) for items in chosen}) == 3
    again = LatentDataset(dataset.folder)
    assert items_of(hold_out(again, 4, 0)[1]) == chosen[0]


def test_nothing_is_held_out_by_default(dataset):
    assert hold_out(dataset, 0, 0) == (dataset, None)


def test_a_picture_that_is_there_twice_is_on_one_side(tmp_path):
    cache_toy(tmp_path)
    for path in tmp_path.glob("shard-*"):
        tensors, metadata = load_tensors(path)
        save_tensors(path, {**tensors, "latents": tensors["latents"][:1].repeat_interleave(8, 0)}, metadata)
    training, held_out = hold_out(LatentDataset(tmp_path), 1, 0)  # two pictures, eight times each
    latents = [part.read(sorted(items_of(part))).latents for part in (training, held_out)]
    assert [len(x) for x in latents] == [8, 8] and all(x.equal(x[:1].expand_as(x)) for x in latents)
    assert not torch.equal(*latents)


def test_two_texts_of_one_picture_are_on_one_side(tmp_path):
    """They may differ in their number of tokens, and then are in two buckets."""
    first = cache_toy(tmp_path, shard_size=16)
    tensors, metadata = load_tensors(first.paths[0])
    longer = torch.cat([tensors["context"]] * 2, dim=1)
    save_tensors(tmp_path / "shard-00001.safetensors", {**tensors, "context": longer}, metadata)
    both = LatentDataset(tmp_path)
    training, held_out = hold_out(both, 6, 0)
    assert len(both.buckets) == 2 and len(held_out) == 6
    rows = [{row for shard, row in items_of(held_out) if shard == number} for number in (0, 1)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


@pytest.mark.parametrize("amount", [15, 0.99, 1000])
def test_more_than_can_be_spared_is_refused(dataset, amount):
    with pytest.raises(ValueError, match=r"validation = .* of the 16 items in .*, and only 14 can be.*lower it"):
        hold_out(dataset, amount, 0)
