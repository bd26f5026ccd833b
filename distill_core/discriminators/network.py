"""Diffusion2GAN's discriminator: a whole trainable network with read-outs at several depths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.dataset import Batch
from ..models.denoiser import Cond, Denoiser
from ..models.precision import on_device
from .latent import LatentDiscriminator


class NetworkDiscriminator(nn.Module):
    """Diffusion2GAN's discriminator: the teacher's network, trained, with a read-out at several depths (section 3.3).

    backbone: that network: ``Denoiser(trainable copy)``, or ``Denoiser(shared backend, LoRA of its own)``; build with
    `for_backbone`.  taps: blocks that are read.  inject_at: blocks that smaller copies of the latents enter, with the
    channels of each.  maps, latent: shapes of the taps' maps [B, C_k, h_k, w_k] and of one latent [C, H, W].
    flow_time: the noise level that the network is told.
    ``forward(latents, noise, cond)``: latents [B, C, H, W] to judge, the student's input noise of the same shape,
    conditioning -> logits [B, N] of all read-outs and positions.
    The noise enters through a convolution that starts at 0 and is added to the latents; the smaller copies enter the
    same way. So before training the network computes what the teacher computes.
    """

    def __init__(
        self,
        backbone: Denoiser,
        taps: Sequence[str],
        inject_at: dict[str, int],
        *,
        maps: Sequence[torch.Size],
        latent: torch.Size,
        pooled_dim: int,
        with_noise: bool = True,
        flow_time: float = 0.0,
        **size,
    ) -> None:
        super().__init__()
        # The backbone's trainable weights, registered first so that they are one run of parameters.
        self.trained = backbone.lora or backbone.backend.network
        self.backbone, self.taps, self.flow_time = backbone, list(taps), flow_time
        self.noise_conv = zero_conv(latent[0], latent[0]) if with_noise else None
        self.input_convs = nn.ModuleList(zero_conv(latent[0], channels) for channels in inject_at.values())
        self.heads = LatentDiscriminator([shape[1] for shape in maps], pooled_dim, **size)
        # A transformer's maps all have one size: earlier ones are judged on coarser grids, as a UNet's are by nature.
        same = len({shape[2:] for shape in maps}) == 1
        coarsest = max(1, min(maps[0][2:]) // 2)  # at least two positions a side
        # Three maps of one size are pooled by 4, 2 and 1, the last tap being the finest.
        self.pools = [min(coarsest, 2 ** (len(maps) - 1 - i)) if same else 1 for i in range(len(maps))]
        self.patch = math.ceil(latent[1] / maps[-1][2])  # latent pixels a side of one token
        modules = dict(backbone.backend.network.named_modules())
        for depth, (input_conv, name) in enumerate(zip(self.input_convs, inject_at, strict=True), 1):
            modules[name].register_forward_pre_hook(self._feed(input_conv, depth), with_kwargs=True)

    @classmethod
    @torch.no_grad()
    def for_backbone(
        cls,
        backbone: Denoiser,
        taps: Sequence[str],
        inject_at: Sequence[str],
        *,
        batch: Batch,
        multi_scale: bool = True,
        with_noise: bool = True,
        flow_time: float = 0.0,
        **size,
    ) -> NetworkDiscriminator:
        """One that fits the backbone's blocks, calibrated on ``batch``, real latents.

        multi_scale False keeps the last read-out alone and feeds no smaller copies.
        """
        taps, inject_at = (list(taps), list(inject_at)) if multi_scale else (list(taps)[-1:], [])
        latents, cond = batch.latents, batch.cond
        modules, handles = dict(backbone.backend.network.named_modules()), []
        widths: dict[str, int] = {}  # channels of the image stream that enters a block

        def note(name: str):
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden, _ = backbone.backend.block_input(args, kwargs)  # a map [B, C, h, w] or tokens [B, N, C]
                widths[name] = hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2]

            return hook

        for name in inject_at:
            handles.append(modules[name].register_forward_pre_hook(note(name), with_kwargs=True))
        sigma = backbone.process.sigma_at_flow_time(latents.new_full((len(latents),), flow_time))
        maps = backbone.features(latents, sigma, cond, taps)
        for handle in handles:
            handle.remove()
        unused = [name for name in inject_at if name not in widths]
        if unused:
            raise ValueError(f"the blocks {unused} run after the last read-out {taps[-1]}: nothing can enter there")
        pooled_dim = 0 if cond.pooled is None else cond.pooled.shape[1]
        shapes, latent = [m.shape for m in maps], latents.shape[1:]
        made = cls(
            backbone,
            taps,
            widths,
            maps=shapes,
            latent=latent,
            pooled_dim=pooled_dim,
            with_noise=with_noise,
            flow_time=flow_time,
            **size,
        )
        on_device(made, latents.device)
        made.heads.calibrate(made.pooled(maps))
        return made

    def forward(self, latents: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        # The latents themselves go along in the backend's switch: `_feed` adds smaller copies of them to the blocks.
        x = latents if self.noise_conv is None else latents + self.noise_conv(noise)
        time = x.new_full((len(x),), self.flow_time)
        sigma = self.backbone.process.sigma_at_flow_time(time)
        maps = self.backbone.features(x, sigma, cond, self.taps, (self, latents))
        return self.heads(self.pooled(maps), time, cond.pooled)

    def pooled(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps at the scales they are judged at."""
        pairs = zip(maps, self.pools, strict=True)
        return [m if pool == 1 else F.avg_pool2d(m, pool, ceil_mode=True) for m, pool in pairs]

    def _feed(self, input_conv: nn.Module, depth: int):
        """Add a smaller copy of the latents to the image stream entering a block, in this discriminator's forwards."""

        def hook(module: nn.Module, args: tuple, kwargs: dict):
            inputs = self.backbone.backend.switch.inputs
            if inputs is None or inputs[0] is not self:
                return None
            hidden, put = self.backbone.backend.block_input(args, kwargs)
            return put(add_small_copy(hidden, inputs[1], input_conv, depth, self.patch))

        return hook


def add_small_copy(hidden: Tensor, latents: Tensor, input_conv: nn.Module, depth: int, patch: int) -> Tensor:
    """hidden + input_conv(smaller latents).

    A map [B, C, h, w] takes them at its size; tokens [B, T + h w, C] of patches of ``patch`` at 1 / 2^depth of their
    grid, spread over it (text tokens, if any, stand first and take nothing).
    """
    if hidden.ndim == 4:
        return hidden + input_conv(F.adaptive_avg_pool2d(latents, (hidden.shape[2], hidden.shape[3]))).to(hidden.dtype)
    grid = math.ceil(latents.shape[2] / patch), math.ceil(latents.shape[3] / patch)
    small = F.adaptive_avg_pool2d(latents, (max(1, grid[0] // 2**depth), max(1, grid[1] // 2**depth)))
    # [B, C, h, w] -> [B, h w, C_hidden]; zeros stand for the text before it
    tokens = input_conv(F.interpolate(small, size=grid)).flatten(2).transpose(1, 2).to(hidden.dtype)
    return hidden + F.pad(tokens, (0, 0, hidden.shape[1] - tokens.shape[1], 0))


def zero_conv(channels: int, out: int) -> nn.Conv2d:
    """A 1x1 convolution that starts at 0."""
    conv = nn.Conv2d(channels, out, 1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
