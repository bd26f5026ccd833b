"""Small trainable heads that turn a feature map of a frozen network into a map of real/fake logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_embedding(flow_time: Tensor, dim: int = 64) -> Tensor:
    """Sinusoidal embedding [B, dim] of a flow time in [0, 1] (Vaswani et al. 2017, section 3.5, at 1000 t)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=flow_time.device) / (dim // 2))
    angles = 1000 * flow_time.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ConvBlock(nn.Module):
    """x + conv(act(norm(x))), scaled to keep the variance."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(F.leaky_relu(self.norm(x), 0.2))) / math.sqrt(2)


class MapHead(nn.Module):
    """Feature map [B, C, H, W] and conditioning [B, cond_dim] -> logits [B, 1, H, W].

    2-D convolutions, so non-square maps keep their layout (LADD section 3). Channels are normalised per position first,
    since residual streams of transformers differ in scale by orders of magnitude between blocks. The conditioning
    enters as a projection: <features, W cond> added to an unconditional logit (Miyato & Koyama 2018, eq. 3).
    """

    def __init__(self, channels: int, cond_dim: int, width: int = 64, blocks: int = 2, kernel: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.inlet = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(ConvBlock(width, kernel) for _ in range(blocks)))
        self.logit = nn.Conv2d(width, 1, 1)
        self.projection = nn.Linear(cond_dim, width)

    def forward(self, features: Tensor, cond: Tensor) -> Tensor:
        x = self.norm(features.movedim(1, -1)).movedim(-1, 1)
        x = F.leaky_relu(self.blocks(self.inlet(x)), 0.2)
        projected = torch.einsum("bchw,bc->bhw", x, self.projection(cond)).unsqueeze(1)
        return self.logit(x) + projected / math.sqrt(x.shape[1])
