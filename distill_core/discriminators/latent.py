"""LADD's discriminator: small trainable heads that turn a frozen teacher's feature maps into maps of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.dataset import Batch
from ..devices import like
from ..diffusion.noise import ItemNoise
from ..models.denoiser import Denoiser
from ..models.precision import on_device
from ..models.strengths import FREQUENCIES, sinusoids


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

    mean: Tensor  # [C, 1, 1]
    std: Tensor

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
        self.input_conv = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(ConvBlock(width, kernel) for _ in range(blocks)))
        self.logit = nn.Conv2d(width, 1, 1)
        self.projection = nn.Linear(cond_dim, width)

    def forward(self, features: Tensor, cond: Tensor) -> Tensor:
        x = F.leaky_relu(self.blocks(self.input_conv(self.norm(features))), 0.2)
        projected = torch.einsum("bchw,bc->bhw", x, self.projection(cond)).unsqueeze(1)
        return self.logit(x) + projected / math.sqrt(x.shape[1])


class LatentDiscriminator(nn.Module):
    """LADD's discriminator: one independent head per tapped teacher block (LADD section 3).

    channels: channel count of each tapped map.  pooled_dim: size of the pooled text embedding, 0 for none.  strengths:
    whether the heads see the guidance strengths of the items: else a student that is told them learns to ignore them.
    ``forward(maps, flow_time, pooled, strengths)``: maps [B, C_k, H, W], the noise level of the re-noised latent as
    flow time [B], pooled [B, P] and strengths [B, 2] -> logits [B, N] of all heads and positions, so that a mean over
    logits is a mean over both.
    Everything is computed in the precision of the heads (float32 in training), whatever that of the maps is.
    """

    def __init__(
        self,
        channels: Sequence[int],
        pooled_dim: int,
        width: int = 64,
        blocks: int = 2,
        kernel: int = 3,
        cond_dim: int = 128,
        strengths: bool = False,
    ) -> None:
        super().__init__()
        self.time = nn.Linear(64, cond_dim)
        self.pooled = nn.Linear(pooled_dim, cond_dim, bias=False) if pooled_dim else None
        self.strengths = nn.Linear(4 * FREQUENCIES, cond_dim, bias=False) if strengths else None
        self.heads = nn.ModuleList(MapHead(c, cond_dim, width, blocks, kernel) for c in channels)

    @classmethod
    @torch.no_grad()
    def for_teacher(cls, teacher: Denoiser, taps: Sequence[str], batch: Batch, **size) -> LatentDiscriminator:
        """Heads for the teacher's blocks ``taps``, calibrated on ``batch``: real latents at levels spread evenly."""
        time = (torch.arange(len(batch.latents)) + 0.5) / len(batch.latents)
        sigma = teacher.process.sigma_at_flow_time(time).to(batch.latents.device)
        noise = ItemNoise(0, range(len(sigma))).normal_like(batch.latents)
        noised = teacher.process.noise_scaling(sigma, noise, batch.latents)
        maps = teacher.features(noised, sigma, batch.cond, taps)
        pooled_dim = 0 if batch.cond.pooled is None else batch.cond.pooled.shape[1]
        discriminator = cls([m.shape[1] for m in maps], pooled_dim, **size)
        on_device(discriminator, noised.device)
        discriminator.calibrate(maps)
        return discriminator

    def calibrate(self, maps: Sequence[Tensor]) -> None:
        """Take each head's normalisation from maps of real examples."""
        for head, features in zip(self.heads, maps, strict=True):
            cast(MapHead, head).norm.calibrate(features)

    def forward(
        self, maps: Sequence[Tensor], flow_time: Tensor, pooled: Tensor | None, strengths: Tensor | None = None
    ) -> Tensor:
        if len(maps) != len(self.heads):
            raise ValueError(f"{len(self.heads)} heads were given {len(maps)} feature maps")
        with torch.autocast(flow_time.device.type, enabled=False):  # logits that differ little must still differ
            return self._logits(maps, flow_time, pooled, strengths)

    def _logits(
        self, maps: Sequence[Tensor], flow_time: Tensor, pooled: Tensor | None, strengths: Tensor | None
    ) -> Tensor:
        dtype = self.time.weight.dtype
        cond = self.time(time_embedding(flow_time).to(dtype))
        if self.pooled is not None:
            assert pooled is not None  # as in the batch that these heads were made for
            cond = cond + self.pooled(pooled.to(dtype))
        if self.strengths is not None and strengths is not None:
            cond = cond + self.strengths(sinusoids(like(strengths, self.strengths.weight)))
        cond = nn.functional.silu(cond)
        logits = [head(m.to(dtype), cond).flatten(1) for head, m in zip(self.heads, maps, strict=True)]
        return torch.cat(logits, dim=1)
