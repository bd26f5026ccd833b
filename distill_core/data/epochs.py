"""The order in which items come: an endless shuffled stream of batches, each of one bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..diffusion.noise import item_generator
from ..models.denoiser import Limits

Item = tuple[int, int]  # a latent with what belongs to it: (shard, row in the shard)


@dataclass(frozen=True)
class ByTokens:
    """Batches of as many items as have at most ``tokens`` tokens together, whatever the size of their latents.

    limits: of the network, which makes the tokens.  processes: that share a batch; its size is a multiple of their
    number, and no batch has fewer items.
    """

    tokens: int
    limits: Limits
    processes: int = 1

    def of(self, height: int, width: int) -> int:
        """The items of a batch of latents of that size."""
        share = self.tokens // (self.limits.tokens(height, width) * self.processes)
        return max(1, share) * self.processes


BatchSize = int | ByTokens


def items_in(size: BatchSize, bucket: tuple) -> int:
    """The items of a batch of a bucket, whose key begins with C, H, W."""
    return size if isinstance(size, int) else size.of(*bucket[1:3])


class Epochs:
    """Batches over buckets of items; only (seed, number, size) decide what is in one."""

    def __init__(self, buckets: Mapping[tuple, Sequence[Item]]) -> None:
        self.buckets = buckets
        self._shuffled: tuple[tuple[int, BatchSize, int], list[list[Item]]] | None = (
            None  # (epoch, size, seed), batches
        )

    def batch(self, number: int, size: BatchSize, seed: int) -> list[Item]:
        """The items of batch ``number``."""
        batches = (max(1, len(items) // items_in(size, key)) for key, items in self.buckets.items())
        epoch, position = divmod(number, sum(batches))
        return self._epoch(epoch, size, seed)[position]

    def _epoch(self, epoch: int, size: BatchSize, seed: int) -> list[list[Item]]:
        """`_shuffle`, remembered: the batches of an epoch are asked for one after the other."""
        if self._shuffled is None or self._shuffled[0] != (epoch, size, seed):
            self._shuffled = (epoch, size, seed), self._shuffle(epoch, size, seed)
        return self._shuffled[1]

    def _shuffle(self, epoch: int, size: BatchSize, seed: int) -> list[list[Item]]:
        """Full batches of each bucket in random order; a bucket smaller than a batch is repeated to fill one."""
        generator = item_generator(seed, epoch)  # drawn from bucket by bucket, then for the order of the batches
        batches = []
        for key, items in self.buckets.items():
            count = items_in(size, key)
            order = torch.randperm(len(items), generator=generator).tolist()
            order *= max(1, -(-count // len(order)))  # 3 items for batches of 8: 0 2 1, 0 2 1, 0 2 1
            # What is left over at the end, less than a batch, waits for another epoch's order.
            starts = range(0, max(1, len(items) // count) * count, count)
            batches += [[items[i] for i in order[start : start + count]] for start in starts]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
