"""Randomness that belongs to an item, not to a batch.

Every item has its own generator, seeded from (seed, item index): image i of a batch is bit for bit the image made
alone, a training run on two processes draws what one process would draw, and a resumed run needs no stored state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.random import SeedSequence
from torch import Tensor


def item_generator(seed: int, *index: int) -> torch.Generator:
    """A CPU generator for one item; different (seed, index...) give independent streams (numpy's SeedSequence)."""
    state = SeedSequence([seed, *index]).generate_state(2, "uint32")
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


class ItemNoise:
    """Draws for a batch in which row i comes only from the generator of item ``items[i]``.

    seed: non-negative integer.  items: one non-negative index per batch row.  All draws are float32 on the CPU.
    """

    def __init__(self, seed: int, items: Sequence[int]) -> None:
        if seed < 0 or min(items, default=0) < 0:
            raise ValueError("seeds and item indices must not be negative")
        self.generators = [item_generator(seed, item) for item in items]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [len(items), *shape]."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), [len(items)]."""
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal with the shape, device and dtype of ``x`` (first dimension: items)."""
        if len(x) != len(self.generators):
            raise ValueError(f"noise for {len(self.generators)} items was asked for a batch of {len(x)}")
        return self.normal(*x.shape[1:]).to(x)
