"""E-LatentLPIPS once more, from its description alone: float64, dense matrices and plain indexing, no shared code.

Takes the draws as plain numbers, one item at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOW_PASS = [  # sym6 scaling coefficients
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
]


def affine(d: dict[str, Tensor], i: int, height: int, width: int, preset: str) -> Tensor:
    """Input-to-output matrix of item i: flip, quarter turns, whole shift; then scale, turn, stretch, turn, move."""

    def turn(angle: float) -> Tensor:
        c, s = math.cos(angle), math.sin(angle)
        return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)

    def move(x: float, y: float) -> Tensor:
        return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)

    def size(x: float, y: float) -> Tensor:
        return torch.tensor([x, y, 1], dtype=torch.float64).diag()

    value = {name: v[i].tolist() for name, v in d.items()}
    steps = []
    if preset.startswith("b"):
        steps += [size(value["flip"], 1), turn(-math.pi / 2 * value["turns"])]
        steps += [move(round(value["shift"][0] * width), round(value["shift"][1] * height))]
    if "g" in preset:
        scale, stretch = 2 ** value["scale"], 2 ** value["stretch"]
        steps += [size(scale, scale), turn(-value["angle_before"]), size(stretch, 1 / stretch)]
        steps += [turn(-value["angle_after"]), move(value["move"][0] * width, value["move"][1] * height)]
    total = torch.eye(3, dtype=torch.float64)
    for step in steps:
        total = step @ total
    return total


def upsampling(n: int) -> Tensor:
    """[2 n, n]: pixel i spreads over positions 2 i - 5 ... 2 i + 6."""
    matrix = torch.zeros(2 * n, n, dtype=torch.float64)
    for i in range(n):
        for k, h in enumerate(LOW_PASS):
            if 0 <= 2 * i - 5 + k < 2 * n:
                matrix[2 * i - 5 + k, i] = h * math.sqrt(2)
    return matrix


def reflected(n: int, low: int, high: int) -> list[int]:
    return [-i if i < 0 else 2 * (n - 1) - i if i >= n else i for i in range(-low, n + high)]


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """One image [C, H, W] (Karras et al. 2020, appendix B)."""
    _, height, width = x.shape
    inverse = matrix.inverse()
    cx, cy = (width - 1) / 2, (height - 1) / 2
    reached = [inverse @ torch.tensor([a * cx, b * cy, 1.0], dtype=torch.float64) for a in (-1, 1) for b in (-1, 1)]

    def margin(sign: int, axis: int, half: float, size: int) -> int:
        need = max(sign * float(r[axis]) for r in reached) - half + 6
        return math.ceil(min(max(need, 0), size - 1))

    left, right = margin(-1, 0, cx, width), margin(1, 0, cx, width)
    top, bottom = margin(-1, 1, cy, height), margin(1, 1, cy, height)
    x = x[:, reflected(height, top, bottom)][:, :, reflected(width, left, right)]
    x = upsampling(x.shape[1]) @ x @ upsampling(x.shape[2]).T
    j, i = torch.meshgrid(torch.arange(-5, 2 * height + 5), torch.arange(-5, 2 * width + 5), indexing="ij")
    point = torch.stack([i / 2 - cx, j / 2 - cy, torch.ones(i.shape)]).double()
    found = torch.einsum("ab,bji->aji", inverse, point)
    x = bilinear(x, 2 * (found[0] + cx + left), 2 * (found[1] + cy + top))
    low = torch.tensor(LOW_PASS, dtype=torch.float64) / math.sqrt(2)
    x = torch.stack([(x[:, 2 * o : 2 * o + 12] * low[:, None]).sum(1) for o in range(height)], 1)
    return torch.stack([(x[:, :, 2 * o : 2 * o + 12] * low).sum(2) for o in range(width)], 2)


def bilinear(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of [C, H, W] at columns u and rows v, with zeros outside."""
    _, height, width = x.shape
    total = torch.zeros(len(x), *u.shape, dtype=torch.float64)
    for column in (u.floor().long(), u.floor().long() + 1):
        for row in (v.floor().long(), v.floor().long() + 1):
            weight = (1 - (u - column).abs()) * (1 - (v - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            total = total + weight * inside * x[:, row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return total


def transformed(x: Tensor, d: dict[str, Tensor], i: int, preset: str) -> Tensor:
    """One latent [C, H, W] under a preset's transforms."""
    _, height, width = x.shape
    if preset[0] in "bg":
        x = warp(x, affine(d, i, height, width, preset))
    if "c" in preset:
        x = x + d["brightness"][i]
        x = (x - x.mean()) * d["contrast"][i] + x.mean()
        x = (x - x.mean(0)) * d["saturation"][i] + x.mean(0)
    if "o" in preset:
        keep = torch.ones(height, width, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                near_x = abs((column + 0.5) / width - float(d["box"][i, 0])) < 0.25
                near_y = abs((row + 0.5) / height - float(d["box"][i, 1])) < 0.25
                keep[row, column] = not (near_x and near_y)
        x = x * keep
    return x


def taps(x: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """VGG16-BN without its first three max-pools: the five taps, with the normalisation as its own step."""
    state = {name: value.double() for name, value in state.items()}
    found, layer = [], 0
    for depth, pool in ((2, False), (2, False), (3, False), (3, True), (3, True)):
        for _ in range(depth):
            x = F.conv2d(x, state[f"convs.{layer}.weight"], state[f"convs.{layer}.bias"], padding=1)
            norm = {name: state[f"norms.{layer}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
            norm = {name: value.view(1, -1, 1, 1) for name, value in norm.items()}
            x = norm["weight"] * (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() + norm["bias"]
            x = x * (x > 0)
            layer += 1
        if pool:
            x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
            x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-3, -1))
        found.append(x)
    return found


def distance(a: Tensor, b: Tensor, state: dict[str, Tensor], heads: list[Tensor]) -> Tensor:
    """sum over taps of the mean over positions of sum_c w_c (f / |f| - g / |g|)^2; two latents [1, C, H, W]."""
    total = torch.zeros((), dtype=torch.float64)
    for f, g, head in zip(taps(a, state), taps(b, state), heads, strict=True):
        f, g = (x / ((x * x).sum(1, keepdim=True) + 1e-8).sqrt() for x in (f, g))
        total = total + torch.einsum("bchw,c->", (f - g) ** 2, head.double()) / f[0, 0].numel()
    return total
