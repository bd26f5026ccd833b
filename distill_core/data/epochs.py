"""The order in which items come: an endless shuffled stream of batches, each of one bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..diffusion.noise import item_generator

Item = tuple[int, int]  # a latent with what belongs to it: (shard, row in the shard)


class Epochs:
    """Batches over buckets of items; only (seed, number, size) decide what is in one."""

    def __init__(self, buckets: Mapping[tuple, Sequence[Item]]) -> None:
        self.buckets = buckets
        self._shuffled: tuple[tuple[int, int, int], list[list[Item]]] | None = None  # (epoch, size, seed) and batches

    def batch(self, number: int, size: int, seed: int) -> list[Item]:
        """The items of batch ``number``."""
        epoch, position = divmod(number, sum(max(1, len(items) // size) for items in self.buckets.values()))
        return self._epoch(epoch, size, seed)[position]

    def _epoch(self, epoch: int, size: int, seed: int) -> list[list[Item]]:
        """`_shuffle`, remembered: the batches of an epoch are asked for one after the other."""
        if self._shuffled is None or self._shuffled[0] != (epoch, size, seed):
            self._shuffled = (epoch, size, seed), self._shuffle(epoch, size, seed)
        return self._shuffled[1]

    def _shuffle(self, epoch: int, size: int, seed: int) -> list[list[Item]]:
        """Full batches of each bucket in random order; a bucket smaller than a batch is repeated to fill one."""
        generator = item_generator(seed, epoch)  # drawn from bucket by bucket, then for the order of the batches
        batches = []
        for items in self.buckets.values():
            order = torch.randperm(len(items), generator=generator).tolist()
            order *= max(1, -(-size // len(order)))  # 3 items for batches of 8: 0 2 1, 0 2 1, 0 2 1
            # What is left over at the end, less than a batch, waits for another epoch's order.
            starts = range(0, max(1, len(items) // size) * size, size)
            batches += [[items[i] for i in order[start : start + size]] for start in starts]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
