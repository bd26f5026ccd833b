"""Discriminators over the features of a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import Batch
from .denoiser import Denoiser
from .heads import MapHead, time_embedding
from .noise import ItemNoise


class LatentDiscriminator(nn.Module):
    """LADD's discriminator: one independent head per tapped teacher block (LADD section 3).

    channels: channel count of each tapped map.  pooled_dim: size of the pooled text embedding, 0 for none.
    ``forward(maps, flow_time, pooled)``: maps [B, C_k, H, W], the noise level of the re-noised latent as flow time [B]
    and pooled [B, P] -> logits [B, N] of all heads and positions, so that a mean over logits is a mean over both.
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
    ) -> None:
        super().__init__()
        self.time = nn.Linear(64, cond_dim)
        self.pooled = nn.Linear(pooled_dim, cond_dim, bias=False) if pooled_dim else None
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
        discriminator = cls([m.shape[1] for m in maps], pooled_dim, **size).to(noised.device)
        for head, features in zip(discriminator.heads, maps, strict=True):
            head.norm.calibrate(features)
        return discriminator

    def forward(self, maps: Sequence[Tensor], flow_time: Tensor, pooled: Tensor | None) -> Tensor:
        if len(maps) != len(self.heads):
            raise ValueError(f"{len(self.heads)} heads were given {len(maps)} feature maps")
        dtype = self.time.weight.dtype
        cond = self.time(time_embedding(flow_time).to(dtype))
        if self.pooled is not None:
            cond = cond + self.pooled(pooled.to(dtype))
        cond = nn.functional.silu(cond)
        logits = [head(m.to(dtype), cond).flatten(1) for head, m in zip(self.heads, maps, strict=True)]
        return torch.cat(logits, dim=1)
