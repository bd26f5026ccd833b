"""Distortions for calibration pairs, in the manner of BAPPS (Zhang et al. 2018, table 2), made on the fly.

Each is ``distort(x, strength, random) -> x'`` on a batch, strength [B] in (0, 1], random an ItemNoise of the batch, so
that an item's distortion depends on its seed alone. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kornia.enhance import jpeg_codec_differentiable
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import elastic_transform2d, get_affine_matrix2d, warp_affine
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.noise import ItemNoise
from ..diffusion.process import expand_like


def noise(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """White noise of a standard deviation up to 0.6."""
    return x + 0.6 * expand_like(strength, x) * random.normal_like(x)


def smooth_noise(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Blotches: noise drawn at an eighth of the size."""
    coarse = random.normal(x.shape[1], -(-x.shape[2] // 8), -(-x.shape[3] // 8))
    return x + 0.6 * expand_like(strength, x) * F.interpolate(
        coarse, size=x.shape[-2:], mode="bicubic", align_corners=False
    )


def blur(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Gaussian, sigma from 0.35 pixels up to 6 % of the width more."""
    sigma = 0.35 + 0.06 * x.shape[-1] * strength
    size = min(2 * int(0.15 * x.shape[-1] + 2) + 1, 2 * (min(x.shape[-2:]) // 2) - 1)
    return gaussian_blur2d(x, (size, size), sigma[:, None].expand(-1, 2))


def tone(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Brightness and contrast."""
    offset, gain = 2 * random.uniform() - 1, 2 * random.uniform() - 1
    return x * expand_like(1 + 0.8 * strength * gain, x) + 0.6 * expand_like(strength * offset, x)


def pixelate(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Down by up to 8 and up again; mixed in by strength between whole factors."""
    height, width = x.shape[-2:]
    small, middle = (
        F.interpolate(F.adaptive_avg_pool2d(x, (max(1, height // by), max(1, width // by))), size=(height, width))
        for by in (8, 3)
    )
    low, high = (2 * expand_like(strength, x)).clamp(max=1), (2 * expand_like(strength, x) - 1).clamp(min=0)
    return torch.lerp(torch.lerp(x, middle, low), small, high)


def warp(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Shift, rotation and scale, the border repeated."""
    height, width = x.shape[-2:]
    signs = torch.stack([2 * random.uniform() - 1 for _ in range(4)], 1)
    centre = torch.tensor([width / 2, height / 2]).expand(len(x), 2)
    shift = 0.12 * strength[:, None] * signs[:, :2] * torch.tensor([width, height])
    scale = (1 + 0.2 * strength * signs[:, 2])[:, None].expand(-1, 2)
    matrix = get_affine_matrix2d(shift, centre, scale, 25 * strength * signs[:, 3])
    return warp_affine(x, matrix[:, :2], (height, width), padding_mode="border", align_corners=False)


def erase(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """A grey box of up to half the side."""
    inside = torch.ones(len(x), 1, 1, 1, dtype=torch.bool)
    for axis in (-2, -1):
        position = (torch.arange(x.shape[axis]) + 0.5) / x.shape[axis]
        part = (position - random.uniform()[:, None]).abs() < 0.05 + 0.2 * strength[:, None]
        inside = inside & (part[:, None, :, None] if axis == -2 else part[:, None, None, :])
    return x.masked_fill(inside, 0)


def blend(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """With the next item of the batch."""
    return torch.lerp(x, x.roll(1, 0), expand_like(strength, x))


def elastic(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Local displacements, smooth over an eighth of the width."""
    field = random.normal(2, *x.shape[-2:])
    size = 2 * (x.shape[-1] // 4) + 1
    sigma = x.shape[-1] / 12
    alpha = 0.1 * sigma * 3.5  # the blur divides the field's standard deviation by about 3.5 sigma
    moved = [
        elastic_transform2d(image[None], part[None], (size, size), (sigma, sigma), (a, a), padding_mode="border")
        for image, part, a in zip(x, field, (alpha * strength).tolist(), strict=True)
    ]
    return torch.cat(moved)


def jpeg(x: Tensor, strength: Tensor, random: ItemNoise) -> Tensor:
    """Quality 60 down to 3."""
    pad = [-s % 16 for s in x.shape[-2:]]
    padded = F.pad((x + 1) / 2, (0, pad[1], 0, pad[0]), mode="replicate")
    coded = jpeg_codec_differentiable(padded, 60 - 57 * strength)
    return coded[..., : x.shape[-2], : x.shape[-1]] * 2 - 1


Distortion = Callable[[Tensor, Tensor, ItemNoise], Tensor]
IN_PIXELS: dict[str, Distortion] = {
    f.__name__: f for f in (noise, smooth_noise, blur, tone, pixelate, warp, erase, blend, elastic, jpeg)
}
IN_LATENTS: dict[str, Distortion] = {f"latent_{f.__name__}": f for f in (noise, smooth_noise, blur, blend)}
UNSEEN = ("elastic", "jpeg")  # never trained on, so that the report can say how the metric generalises
