"""Random masks for inpainting, in five kinds.

Strokes, rectangles and outpainting have the sizes of LaMa's generators at 256 pixels (Suvorov et al. 2021, arXiv
2109.07161), scaled with the picture. LADD's authors do not say theirs (arXiv 2403.12015, section 6.2): the discs, the
shares of the kinds and the limits of the area are our choice. A mask depends on the seed, its item's number and the
picture's size alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..diffusion.noise import item_generator

SIDE = 256  # pixels of the shorter side for which the sizes below are given
AREA = (0.01, 0.95)  # least and most of a picture that a random mask hides, but for one that hides all


class Dice:
    """The random numbers of one mask."""

    def __init__(self, seed: int, item: int) -> None:
        self.generator = item_generator(seed, item, zlib.crc32(b"mask"))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def whole(self, low: int, high: int) -> int:
        """A whole number, ``high`` among them."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))


def _strokes(dice: Dice, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """1 to 10 lines of 1 to 5 straight parts, each 10 to 70 long, 5 to 25 wide."""
    scale = min(width, height) / SIDE
    for _ in range(dice.whole(1, 10)):
        x, y = dice.between(0, width), dice.between(0, height)
        thick = max(1.0, scale * dice.between(5, 25))
        for _ in range(dice.whole(1, 5)):
            angle, length = dice.between(0, 2 * math.pi), scale * dice.between(10, 70)
            start = x, y
            x = min(max(x + length * math.cos(angle), 0), width)
            y = min(max(y + length * math.sin(angle), 0), height)
            draw.line([start, (x, y)], fill=1, width=round(thick))
            for end in (start, (x, y)):
                _disc(draw, *end, thick / 2)


def _discs(dice: Dice, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """1 to 4 discs with radii of 5 to 25 % of the shorter side."""
    for _ in range(dice.whole(1, 4)):
        x, y = dice.between(0, width), dice.between(0, height)
        _disc(draw, x, y, min(width, height) * dice.between(0.05, 0.25))


def _rectangles(dice: Dice, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """1 to 3 rectangles with sides of 30 to 100, at least 10 from the border."""
    scale = min(width, height) / SIDE
    margin = 10 * scale
    for _ in range(dice.whole(1, 3)):
        w, h = scale * dice.between(30, 100), scale * dice.between(30, 100)
        x, y = dice.between(margin, width - margin - w), dice.between(margin, height - margin - h)
        draw.rectangle([x, y, x + w, y + h], fill=1)


def _outpainting(dice: Dice, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """From each border 4 to 25 % with a chance of one half, from one of them at least."""
    chosen = [side for side in range(4) if dice.between(0, 1) < 0.5] or [dice.whole(0, 3)]
    for side in chosen:
        w, h = (max(1, round(share * dice.between(0.04, 0.25))) for share in (width, height))
        boxes = ((0, 0, w, height), (width - w, 0, width, height), (0, 0, width, h), (0, height - h, width, height))
        left, top, right, bottom = boxes[side]
        draw.rectangle([left, top, right - 1, bottom - 1], fill=1)


def _full(dice: Dice, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """The whole picture, so that the text alone is enough."""
    draw.rectangle([0, 0, width, height], fill=1)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)


FULL = "full"
KINDS: dict[str, Callable[[Dice, ImageDraw.ImageDraw, int, int], None]] = {
    "strokes": _strokes,
    "discs": _discs,
    "rectangles": _rectangles,
    "outpainting": _outpainting,
    FULL: _full,
}
SHARES = {"strokes": 0.225, "discs": 0.225, "rectangles": 0.225, "outpainting": 0.225, FULL: 0.1}


def random_masks(seed: int, items: Sequence[int], size: tuple[int, int], shares: Mapping[str, float]) -> Tensor:
    """Masks [B, 1, H, W] of pictures of ``size`` (width, height), 1 where they are to be filled and else 0.

    shares: how often each of `KINDS` comes. A mask of less than 1 % or more than 95 % of the picture is drawn again.
    """
    return torch.stack([_random_mask(Dice(seed, item), *size, shares) for item in items]).unsqueeze(1)


def _random_mask(dice: Dice, width: int, height: int, shares: Mapping[str, float]) -> Tensor:
    names, point = [name for name in KINDS if shares.get(name)], dice.between(0, sum(shares.values()))
    edges = numpy.cumsum([shares[name] for name in names])
    kind = names[min(int(numpy.searchsorted(edges, point, side="right")), len(names) - 1)]
    while True:
        canvas = Image.new("L", (width, height))
        KINDS[kind](dice, ImageDraw.Draw(canvas), width, height)
        mask = torch.from_numpy(numpy.asarray(canvas).copy()).float()
        if kind == FULL or AREA[0] <= mask.mean().item() <= AREA[1]:
            return mask
