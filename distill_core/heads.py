"""Small trainable heads that turn a feature map of a frozen network into a map of real/fake logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


def time_embedding(flow_time: Tensor, dim: int = 64) -> Tensor:
    """Sinusoidal embedding [B, dim] of a flow time in [0, 1] (Vaswani et al. 2017, section 3.5, at 1000 t)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=flow_time.device) / (dim // 2))
    angles = 1000 * flow_time.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class FeatureNorm(nn.Module):
    """Features [B, C, H, W] to unit scale: over the channels of each position, then each channel by fixed statistics.

    Blocks of a transformer differ in scale by orders of magnitude, and so do the channels of one block; what tells real
    from fake often sits in the small ones, which a head would learn last. ``calibrate`` takes the statistics from
    features of real examples; until then they are 0 and 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    @staticmethod
    def by_position(features: Tensor) -> Tensor:
        return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        std, mean = torch.std_mean(self.by_position(features.float()), dim=(0, 2, 3))
        self.mean.copy_(mean.view(-1, 1, 1))
        self.std.copy_(std.clamp(min=1e-3).view(-1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return (self.by_position(features) - self.mean) / self.std


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

    2-D convolutions, so non-square maps keep their layout (LADD section 3), over features normalised by `FeatureNorm`.
    The conditioning enters as a projection: <features, W cond> added to an unconditional logit (Miyato & Koyama 2018,
    eq. 3).
    """

    def __init__(self, channels: int, cond_dim: int, width: int = 64, blocks: int = 2, kernel: int = 3) -> None:
        super().__init__()
        self.norm = FeatureNorm(channels)
        self.inlet = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(ConvBlock(width, kernel) for _ in range(blocks)))
        self.logit = nn.Conv2d(width, 1, 1)
        self.projection = nn.Linear(cond_dim, width)

    def forward(self, features: Tensor, cond: Tensor) -> Tensor:
        x = F.leaky_relu(self.blocks(self.inlet(self.norm(features))), 0.2)
        projected = torch.einsum("bchw,bc->bhw", x, self.projection(cond)).unsqueeze(1)
        return self.logit(x) + projected / math.sqrt(x.shape[1])


def spectral_conv1d(channels: int, out: int, kernel: int) -> nn.Module:
    """1-D convolution with circular padding and spectral normalisation (Miyato et al. 2018), one power iteration."""
    conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
    return spectral_norm(conv, eps=1e-12)


class TokenBlock(nn.Module):
    """act(conv(x)) with a spectrally normalised convolution over the sequence of tokens."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = spectral_conv1d(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), 0.2)


class TokenHead(nn.Module):
    """Tokens [B, C, N] and conditioning [B, cond_dim] -> logits [B, N].

    The head that ADD takes from StyleGAN-T (Sauer et al. 2023, section 3.2): a block over single tokens, a residual
    block over nine neighbours, and a projection of ``width`` channels on the conditioning. Instead of batch statistics,
    which would let the items of a batch influence each other, tokens are standardised once and for all by ``mean`` and
    ``std`` [C], those of real images.
    """

    def __init__(self, mean: Tensor, std: Tensor, cond_dim: int, width: int = 64) -> None:
        super().__init__()
        channels = len(mean)
        self.register_buffer("mean", mean.view(1, -1, 1).clone())
        self.register_buffer("std", std.view(1, -1, 1).clone())
        self.single, self.neighbours = TokenBlock(channels, 1), TokenBlock(channels, 9)
        self.logit = spectral_conv1d(channels, width, 1)
        self.projection = nn.Linear(cond_dim, width)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        x = self.single((tokens - self.mean) / self.std)
        x = self.logit((self.neighbours(x) + x) / math.sqrt(2))
        return torch.einsum("bcn,bc->bn", x, self.projection(cond)) / math.sqrt(x.shape[1])
