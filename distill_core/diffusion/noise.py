"""Randomness that belongs to an item, not to a batch.

Every item has its own generator, seeded from (seed, item index): image i of a batch is bit for bit the image made
alone, a training run on two processes draws what one process would draw, and a resumed run needs no stored state.
Training draws from named streams, so that a term's randomness does not depend on which other terms there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from numpy.random import SeedSequence
from torch import Tensor

from ..devices import like


def item_generator(seed: int, *index: int) -> torch.Generator:
    """A CPU generator for one item, seeded by numpy's SeedSequence of (seed, index...).

    torch's CPU generator takes 32 bits of a seed, so two items share a stream in about 1 of 4e9 pairs: some pair among
    100,000 items is likely to, and any given two are not.
    """
    state = SeedSequence([seed, *index]).generate_state(2, "uint32")
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


class ItemNoise:
    """Draws for a batch in which row i comes only from the generator of item ``items[i]``.

    seed: non-negative integer.  items: one non-negative index per batch row.  All draws are float32 on the CPU.
    purpose: names an independent stream of the same items (`named`).
    """

    def __init__(self, seed: int, items: Sequence[int], purpose: str = "") -> None:
        if seed < 0 or min(items, default=0) < 0:
            raise ValueError("seeds and item indices must not be negative")
        self.seed, self.items = seed, items
        key = [zlib.crc32(purpose.encode())] if purpose else []
        self.generators = [item_generator(seed, item, *key) for item in items]
        self._streams: dict[str, ItemNoise] = {}

    def named(self, purpose: str) -> ItemNoise:
        """The stream of that name, always the same one: what a purpose draws does not depend on who else draws."""
        if purpose not in self._streams:
            self._streams[purpose] = ItemNoise(self.seed, self.items, purpose)
        return self._streams[purpose]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [len(items), *shape]."""
        out = torch.empty(len(self.generators), *shape)
        for row, generator in zip(out, self.generators, strict=True):
            row.normal_(generator=generator)
        return out

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), [len(items)]."""
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal with the shape, device and dtype of ``x`` (first dimension: items)."""
        if len(x) != len(self.generators):
            raise ValueError(f"noise for {len(self.generators)} items was asked for a batch of {len(x)}")
        return like(self.normal(*x.shape[1:]), x)
