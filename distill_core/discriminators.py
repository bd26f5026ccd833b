"""Discriminators over the features of a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import Batch
from .denoiser import Denoiser
from .heads import MapHead, time_embedding


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
        """Heads that fit the teacher's blocks ``taps``, whose channel counts one forward of an example tells."""
        one, cond = batch.latents[:1], batch.cond[:1]
        sigma = teacher.process.sigma_at_flow_time(one.new_full((1,), 0.5))
        maps = teacher.features(one, sigma, cond, taps)
        pooled_dim = 0 if cond.pooled is None else cond.pooled.shape[1]
        return cls([m.shape[1] for m in maps], pooled_dim, **size).to(one.device)

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
