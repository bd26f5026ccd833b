"""Augmentation of what a discriminator sees, real and fake alike (DiffAugment, Zhao et al. 2020, arXiv 2006.10738).

With few pictures a discriminator knows them by heart; one that only ever sees them moved, cut or mirrored cannot, and
as the student's results are treated in the same way, nothing of that shows in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..devices import upload
from ..diffusion.noise import ItemNoise

MOVED_BY = 1 / 8  # of a side, at most
CUT = 1 / 2  # of a side


class Augmentation:
    """One draw for each item of a batch; a call gives latents [B, C, H, W] that are changed by it, with gradients.

    kinds: some of `KINDS`, applied in the order given.  random: of the items.
    """

    def __init__(self, kinds: Sequence[str], random: ItemNoise) -> None:
        self.draws = [(KINDS[kind], torch.stack([random.named(kind).uniform() for _ in range(2)])) for kind in kinds]

    def __call__(self, latents: Tensor) -> Tensor:
        for change, draw in self.draws:
            latents = change(latents, upload(draw, latents.device))
        return latents


def translation(x: Tensor, draw: Tensor) -> Tensor:
    """Moved by up to an eighth of each side; what comes in is 0.  draw: [2, B] in [0, 1)."""
    batch, _, *sides = x.shape
    found, inside = [], []
    for side, part in zip(sides, draw, strict=True):
        most = int(side * MOVED_BY + 0.5)
        index = torch.arange(side, device=x.device) - ((part * (2 * most + 1)).floor().long() - most)[:, None]
        found.append(index.clamp(0, side - 1))  # [B, side]
        inside.append((index >= 0) & (index < side))
    rows = torch.arange(batch, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[rows, found[0][:, :, None], found[1][:, None, :]].permute(0, 3, 1, 2)
    return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


def cutout(x: Tensor, draw: Tensor) -> Tensor:
    """0 in a rectangle of half of each side, whose middle may be anywhere."""
    covered = []
    for side, part in zip(x.shape[2:], draw, strict=True):
        size = int(side * CUT + 0.5)
        first = (part * (side + 1 - size % 2)).floor().long()[:, None] - size // 2
        index = torch.arange(side, device=x.device)
        covered.append((index >= first) & (index < first + size))
    return x * ~(covered[0][:, None, :, None] & covered[1][:, None, None, :])


def flip(x: Tensor, draw: Tensor) -> Tensor:
    """Half of the items mirrored left to right."""
    return torch.where((draw[0] < 0.5)[:, None, None, None], x.flip(3), x)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"translation": translation, "cutout": cutout, "flip": flip}
