"""Items of a dataset that are kept from training, to measure a student on."""

from __future__ import annotations

import zlib
from collections import defaultdict

import torch
from torch import Tensor

from ..diffusion.noise import item_generator
from .dataset import Item, LatentDataset


def hold_out(dataset: LatentDataset, amount: float, seed: int) -> tuple[LatentDataset, LatentDataset | None]:
    """A dataset to train on, and the items that it lacks (None: none). Only (dataset, amount, seed) decide which.

    amount: below 1 a share of all items (at least one), from 1 on their number, 0 for none. A latent that is there
    twice is held out as one, and every bucket keeps one to train on. Raises ValueError where so many cannot be had.
    """
    if not amount:
        return dataset, None
    wanted = max(1, round(amount * len(dataset))) if amount < 1 else round(amount)
    same = _same_latents(dataset)
    left = {key: sum(key in buckets for buckets in same) for key in dataset.buckets}  # different latents of a bucket
    held_out: set[Item] = set()
    order = torch.randperm(len(same), generator=item_generator(seed, zlib.crc32(b"held out"))).tolist()
    for buckets in (same[i] for i in order):
        if len(held_out) < wanted and all(left[key] > 1 for key in buckets):
            left = {key: count - (key in buckets) for key, count in left.items()}
            held_out.update(item for items in buckets.values() for item in items)
    if len(held_out) < wanted:
        raise ValueError(
            f"validation = {amount:g} holds {wanted} of the {len(dataset)} items in {dataset.folder} out, and only "
            f"{len(held_out)} can be: each size keeps one to train on, and equal ones are held out together; lower it, "
            "or add items"
        )
    return dataset.part(lambda item: item not in held_out), dataset.part(lambda item: item in held_out)


def _same_latents(dataset: LatentDataset) -> list[dict[tuple, list[Item]]]:
    """For each latent its items by bucket: two texts of one picture may be in two. Middle rows tell latents apart."""
    found: dict[tuple, dict[tuple, list[Item]]] = defaultdict(lambda: defaultdict(list))
    rows: dict[int, Tensor] = {}
    for key, bucket in dataset.buckets.items():
        for shard, row in bucket:
            if shard not in rows:
                latents = dataset.files[shard].get_slice("latents")
                middle = latents.get_shape()[2] // 2
                rows[shard] = latents[:, :, middle : middle + 1].float()
            found[key[:3], rows[shard][row].numpy().tobytes()][key].append((shard, row))
    return list(found.values())
