"""Random transforms of the ensembled metric: drawn for each item, applied alike to both latents.

Geometry follows the augmentation pipeline of Karras et al. (2020, arXiv 2006.06676, appendix B) with every transform
on: blitting (b) and general geometry (g) become one affine matrix, executed once between a 2x up-sampling and a 2x
down-sampling with the orthogonal sym6 wavelet. Colour (c) is that of DiffAugment (Zhao et al. 2020, arXiv 2006.10738).
Diffusion2GAN (arXiv 2405.05967) ensembles geometry and cutout (o).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ..devices import Table, like, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.process import expand_like

PRESETS = ("none", "b", "g", "bg", "c", "o", "co", "bgc", "bgco")  # the letters say which transforms are on
TRANSLATION = 0.125  # of the side: half-width of the whole-pixel draw, standard deviation of the fractional one
LOG2_SCALE = 0.2  # standard deviation of the base-2 logarithm of the scales
CUTOUT = 0.5  # side of the box, of the latent's side
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
LOW_PASS = Table(torch.tensor(SYM6, dtype=torch.float64))
DELAY = 5  # of that filter: its weight lies around tap 5, so pixel i sits at position 2 i after up-sampling
REACH = len(SYM6) // 2  # pixels that up- and down-sampling read beyond the transformed corners


@dataclass(frozen=True)
class Draws:
    """The random numbers of one draw for a batch of B items, all float64 on the CPU; `draw` makes them.

    flip: 1 or -1 [B].  turns: quarter turns 0-3 [B].  shift: whole-pixel translation as a fraction of width and height
    [B, 2].  scale, stretch: base-2 logarithms [B].  angle_before, angle_after: radians [B].  move: fractional
    translation as a fraction of width and height [B, 2].  brightness, contrast, saturation [B].  box: centre of the
    cutout, fractions of width and height [B, 2].
    """

    flip: Tensor
    turns: Tensor
    shift: Tensor
    scale: Tensor
    angle_before: Tensor
    stretch: Tensor
    angle_after: Tensor
    move: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    box: Tensor

    def named(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def draw(random: ItemNoise) -> Draws:
    """All numbers of one draw. Every preset draws all of them, so that "b" is the b part of "bg" at the same seed."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * random.uniform().double()

    def pair(one: Callable[[], Tensor]) -> Tensor:
        return torch.stack([one(), one()], 1)

    normal = random.normal(4).double()
    return Draws(
        flip=1 - 2 * between(0, 2).floor(),
        turns=between(0, 4).floor(),
        shift=pair(lambda: between(-TRANSLATION, TRANSLATION)),
        scale=LOG2_SCALE * normal[:, 0],
        angle_before=between(-math.pi, math.pi),
        stretch=LOG2_SCALE * normal[:, 1],
        angle_after=between(-math.pi, math.pi),
        move=TRANSLATION * normal[:, 2:],
        brightness=between(-0.5, 0.5),
        contrast=between(0.5, 1.5),
        saturation=between(0, 2),
        box=pair(lambda: between(0, 1)),
    )


def _matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """[B, 3, 3] from 2 or 3 rows of numbers or [B]."""
    rows = [*rows, [0, 0, 1]][:3]
    return torch.stack([torch.stack([torch.zeros_like(like) + v for v in row], -1) for row in rows], -2)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[x, 0, 0], [0, y, 0]], x)


def _rotate(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, 0], [sin, cos, 0]], angle)


def _translate(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[1, 0, x], [0, 1, y]], x)


def geometry(draws: Draws, height: int, width: int, preset: str) -> Tensor:
    """Input-to-output affine matrix [B, 3, 3] in pixels, x before y, origin at the centre (appendix B, lines 5-33).

    preset: with "b" in it flip, quarter turns and whole-pixel translation, with "g" the general transforms.
    """
    d = draws
    matrix = torch.eye(3, dtype=d.flip.dtype).expand(len(d.flip), 3, 3)
    if "b" in preset:
        matrix = _scale(d.flip, torch.ones_like(d.flip)) @ matrix
        matrix = _rotate(-math.pi / 2 * d.turns) @ matrix
        matrix = _translate((d.shift[:, 0] * width).round(), (d.shift[:, 1] * height).round()) @ matrix
    if "g" in preset:
        matrix = _scale(d.scale.exp2(), d.scale.exp2()) @ matrix
        matrix = _rotate(-d.angle_before) @ matrix
        matrix = _scale(d.stretch.exp2(), (-d.stretch).exp2()) @ matrix
        matrix = _rotate(-d.angle_after) @ matrix
        matrix = _translate(d.move[:, 0] * width, d.move[:, 1] * height) @ matrix
    return matrix


def margins(inverse: Tensor, height: int, width: int) -> Tensor:
    """Whole pixels of reflection that each item's transform needs: left, top, right, bottom [B, 4].

    What the corner pixels reach plus the filter's reach, and at most what one reflection can give.
    """
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64) * half
    reached = corners @ inverse[:, :2, :2].mT + inverse[:, None, :2, 2]
    beyond = torch.cat([-reached.amin(1), reached.amax(1)], 1) - half.repeat(2) + REACH
    largest = torch.tensor([width - 1, height - 1] * 2, dtype=torch.float64)
    return beyond.clamp(min=0).minimum(largest).ceil().long()


class Warp:
    """A batch of affine transforms of [B, C, H, W], ready to be applied to several tensors of that size.

    matrix: input-to-output [B, 3, 3] as `geometry` gives it.  An item's result does not depend on the others: where the
    batch is padded further than the item needs, its own padding ends in zeros all the same.
    """

    def __init__(self, matrix: Tensor, height: int, width: int) -> None:
        inverse = torch.linalg.inv(matrix)
        self.each = margins(inverse, height, width)
        self.padding = self.each.amax(0).tolist()
        left, top, right, bottom = self.padding
        self.source = (2 * (height + top + bottom), 2 * (width + left + right))
        self.target = (2 * height + 2 * DELAY, 2 * width + 2 * DELAY)
        self.theta = self._theta(inverse, height, width)

    def _theta(self, inverse: Tensor, height: int, width: int) -> Tensor:
        """Normalised output coordinates to normalised coordinates in the padded, up-sampled input [B, 2, 3]."""
        like = inverse[:, 0, 0]
        full = torch.full_like

        def affine(scale: tuple[float, float], offset: tuple[float, float]) -> Tensor:
            matrix = _scale(full(like, scale[0]), full(like, scale[1]))
            return _translate(full(like, offset[0]), full(like, offset[1])) @ matrix

        (rows, columns), (from_rows, from_columns) = self.target, self.source
        half = ((width - 1) / 2, (height - 1) / 2)
        index = affine((columns / 2, rows / 2), ((columns - 1) / 2, (rows - 1) / 2))
        position = affine((0.5, 0.5), (-DELAY / 2 - half[0], -DELAY / 2 - half[1]))  # index 2 i + DELAY is pixel i
        found = affine((2, 2), (2 * (half[0] + self.padding[0]), 2 * (half[1] + self.padding[1])))
        normal = affine((2 / from_columns, 2 / from_rows), (1 / from_columns - 1, 1 / from_rows - 1))
        return (normal @ found @ inverse @ position @ index)[:, :2]

    def _own_padding(self, x: Tensor, factor: int) -> Tensor:
        """Zero what lies beyond an item's own margins; ``factor`` 2 after up-sampling."""
        if (self.each == self.each[:1]).all():
            return x
        for axis, low, high in ((-1, 0, 2), (-2, 1, 3)):
            position = torch.arange(x.shape[axis])
            first = factor * (self.padding[low] - self.each[:, low, None])
            last = x.shape[axis] - factor * (self.padding[high] - self.each[:, high, None])
            inside = like((position >= first) & (position < last), x)
            x = x * (inside[:, None, None, :] if axis == -1 else inside[:, None, :, None])
        return x

    def __call__(self, x: Tensor) -> Tensor:
        left, top, right, bottom = self.padding
        x = self._own_padding(F.pad(x, (left, right, top, bottom), mode="reflect"), 1)
        x = self._own_padding(_resample(x, F.conv_transpose2d, 2**0.5, DELAY), 2)
        grid = F.affine_grid(like(self.theta, x), [*x.shape[:2], *self.target], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return _resample(x, F.conv2d, 0.5**0.5, 0)


def _resample(x: Tensor, convolution: Callable, gain: float, padding: int) -> Tensor:
    """The wavelet's low pass with stride 2 along both axes; the transposed one is its exact adjoint up to ``gain``."""
    kernel, channels = gain * LOW_PASS.on(x.device, x.dtype), x.shape[1]
    for shape, stride, pad in (((1, -1), (1, 2), (0, padding)), ((-1, 1), (2, 1), (padding, 0))):
        weight = kernel.view(1, 1, *shape).expand(channels, -1, -1, -1)
        x = convolution(x, weight, stride=stride, padding=pad, groups=channels)
    return x


def _per_item(value: Tensor, x: Tensor) -> Tensor:
    return expand_like(like(value, x), x)


def colour(x: Tensor, draws: Draws) -> Tensor:
    """Brightness; contrast about the item's mean; saturation about each position's mean over channels."""
    x = x + _per_item(draws.brightness, x)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * _per_item(draws.contrast, x)
    grey = x.mean(1, keepdim=True)
    return grey + (x - grey) * _per_item(draws.saturation, x)


def cutout(x: Tensor, draws: Draws) -> Tensor:
    """Zeros in a box of half the side around a random centre, cut off at the border."""
    height, width = x.shape[-2:]
    inside = []
    for size, centre in ((height, draws.box[:, 1]), (width, draws.box[:, 0])):
        position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        inside.append((position - centre[:, None]).abs() < CUTOUT / 2)
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(upload(box, x.device), 0)


def transform(draws: Draws, preset: str, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """The function of a latent [B, C, height, width] that a preset's transforms make of a draw."""
    if preset not in PRESETS[1:]:
        raise ValueError(f"the transforms must be one of {list(PRESETS[1:])}, not {preset!r}")
    moves = "b" in preset or "g" in preset
    warp = Warp(geometry(draws, height, width, preset), height, width) if moves else None

    def apply(x: Tensor) -> Tensor:
        # A coordinate rounded to float32 moves the distance by some 1e-6; in float64 this is still 1 % of the time.
        moved = x.double() if x.device.type != "mps" else x.float()
        moved = warp(moved) if warp else moved
        moved = colour(moved, draws) if "c" in preset else moved
        return (cutout(moved, draws) if "o" in preset else moved).to(x.dtype)

    return apply
