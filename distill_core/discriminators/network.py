"""Diffusion2GAN's discriminator: a whole trainable network with read-outs at several depths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.dataset import Batch
from ..models.denoiser import Cond, Denoiser
from .latent import LatentDiscriminator


class NetworkDiscriminator(nn.Module):
    """Diffusion2GAN's discriminator: the teacher's network, trained, with a read-out at several depths (section 3.3).

    critic: a view of it: ``Denoiser(trainable copy)`` or ``Denoiser(shared backbone, path of its own)``; build with
    `for_critic`. ``forward(latents, noise, cond)``: latents [B, C, H, W] to judge, the student's input noise of the
    same shape, conditioning -> logits [B, N] of all read-outs and positions.
    The noise enters through a convolution that starts at 0 and is added to the latents; smaller copies of the latents
    enter the blocks ``entries`` the same way. So before training the network computes what the teacher computes.
    """

    def __init__(
        self,
        critic: Denoiser,
        taps: Sequence[str],
        entries: dict[str, int],
        maps: Sequence[torch.Size],
        latent: torch.Size,
        pooled_dim: int,
        with_noise: bool = True,
        flow_time: float = 0.0,
        **size,
    ) -> None:
        super().__init__()
        self.trunk = critic.lora or critic.backend.network  # first, so that it is one run of parameters
        self.critic, self.taps, self.flow_time = critic, list(taps), flow_time
        self.noise_conv = zero_conv(latent[0], latent[0]) if with_noise else None
        self.input_convs = nn.ModuleList(zero_conv(latent[0], channels) for channels in entries.values())
        self.heads = LatentDiscriminator([shape[1] for shape in maps], pooled_dim, **size)
        # A transformer's maps all have one size: earlier ones are judged on coarser grids, as a UNet's are by nature.
        same = len({shape[2:] for shape in maps}) == 1
        coarsest = max(1, min(maps[0][2:]) // 2)  # at least two positions a side
        self.pools = [min(coarsest, 2 ** (len(maps) - 1 - i)) if same else 1 for i in range(len(maps))]
        self.patch = math.ceil(latent[1] / maps[-1][2])
        modules = dict(critic.backend.network.named_modules())
        for depth, (input_conv, name) in enumerate(zip(self.input_convs, entries, strict=True), 1):
            modules[name].register_forward_pre_hook(self._feed(input_conv, depth), with_kwargs=True)

    @classmethod
    @torch.no_grad()
    def for_critic(
        cls,
        critic: Denoiser,
        taps: Sequence[str],
        entries: Sequence[str],
        batch: Batch,
        multi_scale: bool = True,
        with_noise: bool = True,
        flow_time: float = 0.0,
        **size,
    ) -> NetworkDiscriminator:
        """One that fits the critic's blocks, calibrated on ``batch``, real latents.

        multi_scale False keeps the last read-out alone and feeds no smaller copies.
        """
        taps, entries = (list(taps), list(entries)) if multi_scale else (list(taps)[-1:], [])
        latents, cond = batch.latents, batch.cond
        modules, widths, handles = dict(critic.backend.network.named_modules()), {}, []

        def note(name: str):
            def hook(module, args, kwargs):
                hidden, _ = critic.backend.block_input(args, kwargs)
                widths[name] = hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2]

            return hook

        for name in entries:
            handles.append(modules[name].register_forward_pre_hook(note(name), with_kwargs=True))
        sigma = critic.process.sigma_at_flow_time(latents.new_full((len(latents),), flow_time))
        maps = critic.features(latents, sigma, cond, taps)
        for handle in handles:
            handle.remove()
        unused = [name for name in entries if name not in widths]
        if unused:
            raise ValueError(f"the blocks {unused} run after the last read-out {taps[-1]}: nothing can enter there")
        pooled_dim = 0 if cond.pooled is None else cond.pooled.shape[1]
        shapes, latent = [m.shape for m in maps], latents.shape[1:]
        made = cls(critic, taps, widths, shapes, latent, pooled_dim, with_noise, flow_time, **size).to(latents.device)
        made.heads.calibrate(made.pooled(maps))
        return made

    def forward(self, latents: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        x = latents if self.noise_conv is None else latents + self.noise_conv(noise)
        time = x.new_full((len(x),), self.flow_time)
        sigma = self.critic.process.sigma_at_flow_time(time)
        maps = self.critic.features(x, sigma, cond, self.taps, (self, latents))
        return self.heads(self.pooled(maps), time, cond.pooled)

    def pooled(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps at the scales they are judged at."""
        pairs = zip(maps, self.pools, strict=True)
        return [m if pool == 1 else F.avg_pool2d(m, pool, ceil_mode=True) for m, pool in pairs]

    def _feed(self, input_conv: nn.Module, depth: int):
        """Add a smaller copy of the latents to the image stream entering a block, in this discriminator's forwards."""

        def hook(module: nn.Module, args: tuple, kwargs: dict):
            inputs = self.critic.backend.switch.inputs
            if inputs is None or inputs[0] is not self:
                return None
            hidden, put = self.critic.backend.block_input(args, kwargs)
            return put(add_small_copy(hidden, inputs[1], input_conv, depth, self.patch))

        return hook


def add_small_copy(hidden: Tensor, latents: Tensor, input_conv: nn.Module, depth: int, patch: int) -> Tensor:
    """hidden + inlet(smaller latents). A map [B, C, h, w] takes them at its size; tokens [B, T + h w, C] of patches of
    ``patch`` at 1 / 2^depth of their grid, spread over it (text tokens, if any, stand first and take nothing)."""
    if hidden.ndim == 4:
        return hidden + input_conv(F.adaptive_avg_pool2d(latents, (hidden.shape[2], hidden.shape[3]))).to(hidden.dtype)
    grid = math.ceil(latents.shape[2] / patch), math.ceil(latents.shape[3] / patch)
    small = F.adaptive_avg_pool2d(latents, (max(1, grid[0] // 2**depth), max(1, grid[1] // 2**depth)))
    tokens = input_conv(F.interpolate(small, size=grid)).flatten(2).transpose(1, 2).to(hidden.dtype)
    return hidden + F.pad(tokens, (0, 0, hidden.shape[1] - tokens.shape[1], 0))


def zero_conv(channels: int, out: int) -> nn.Conv2d:
    """A 1x1 convolution that starts at 0."""
    conv = nn.Conv2d(channels, out, 1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
