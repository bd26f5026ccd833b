"""Discriminators over the features of a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .heads import MapHead, time_embedding


class LatentDiscriminator(nn.Module):
    """LADD's discriminator: one independent head per tapped teacher block (LADD section 3).

    channels: channel count of each tapped map.  pooled_dim: size of the pooled text embedding, 0 for none.
    ``forward(maps, flow_time, pooled)``: maps [B, C_k, H, W], the noise level of the re-noised latent as flow time [B]
    and pooled [B, P] -> logits [B, N] of all heads and positions, so that a mean over logits is a mean over both.
    """

    def __init__(
        self, channels: Sequence[int], pooled_dim: int, width: int = 64, blocks: int = 2, kernel: int = 3, cond_dim: int = 128
    ) -> None:
        super().__init__()
        self.time = nn.Linear(64, cond_dim)
        self.pooled = nn.Linear(pooled_dim, cond_dim, bias=False) if pooled_dim else None
        self.heads = nn.ModuleList(MapHead(c, cond_dim, width, blocks, kernel) for c in channels)

    def forward(self, maps: Sequence[Tensor], flow_time: Tensor, pooled: Tensor | None) -> Tensor:
        if len(maps) != len(self.heads):
            raise ValueError(f"{len(self.heads)} heads were given {len(maps)} feature maps")
        cond = self.time(time_embedding(flow_time))
        if self.pooled is not None:
            cond = cond + self.pooled(pooled.float())
        cond = nn.functional.silu(cond)
        logits = [head(m.float(), cond).flatten(1) for head, m in zip(self.heads, maps, strict=True)]
        return torch.cat(logits, dim=1)
