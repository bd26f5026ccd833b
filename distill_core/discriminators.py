"""Discriminators: heads on a frozen teacher's features (LADD), heads on a frozen vision network's tokens (ADD), and a
whole trainable network (Diffusion2GAN)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Batch
from .denoiser import Cond, Denoiser
from .heads import MapHead, TokenHead, time_embedding
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


def text_embedding(cond: Cond) -> Tensor:
    """One vector [B, P] a prompt: the pooled text where the model has one, else the mean of its tokens."""
    if cond.pooled is not None:
        return cond.pooled
    if cond.mask is None:
        return cond.context.mean(1)
    mask = cond.mask.unsqueeze(2)
    return (cond.context * mask).sum(1) / mask.sum(1)


class PixelDiscriminator(nn.Module):
    """ADD's trainable heads on the tokens of a frozen vision network, conditioned on text and image (section 3.2).

    real: tokens [B, C_k, N_k] of a few real images, which give each tap's width, mean and deviation.
    text_dim, image_dim: sizes of the two embeddings, which are concatenated before the projection; 0 leaves one out.
    ``forward(tokens, text, image)``: tokens [B, C_k, N_k], text [B, text_dim], image [B, image_dim] -> logits [B, N],
    N = heads * max N_k: the logits of taps with fewer tokens are repeated, so that every head weighs the same.
    """

    def __init__(self, real: Sequence[Tensor], text_dim: int, image_dim: int, width: int = 64) -> None:
        super().__init__()
        self.text_dim, self.image_dim = text_dim, image_dim
        cond_dim = text_dim + image_dim or 1
        moments = [torch.std_mean(tokens.detach().float(), dim=(0, 2)) for tokens in real]
        self.heads = nn.ModuleList(TokenHead(mean, std + 1e-3 * std.max(), cond_dim, width) for std, mean in moments)

    def forward(self, tokens: Sequence[Tensor], text: Tensor, image: Tensor) -> Tensor:
        dtype = self.heads[0].projection.weight.dtype
        parts = [part.to(dtype) for part, dim in ((text, self.text_dim), (image, self.image_dim)) if dim]
        cond = torch.cat(parts, dim=1) if parts else text.new_ones(len(text), 1).to(dtype)
        logits = [head(t.to(dtype), cond) for head, t in zip(self.heads, tokens, strict=True)]
        most = max(part.shape[1] for part in logits)
        return torch.cat([F.interpolate(part.unsqueeze(1), most).squeeze(1) for part in logits], dim=1)


class NetworkDiscriminator(nn.Module):
    """Diffusion2GAN's discriminator: the teacher's network, trained, with a read-out at several depths (section 3.3).

    critic: a view of it: ``Denoiser(trainable copy)`` or ``Denoiser(shared backbone, path of its own)``; build with
    `for_critic`. ``forward(latents, noise, cond)``: latents [B, C, H, W] to judge, the student's input noise of the
    same shape, conditioning -> logits [B, N] of all read-outs and positions.
    The noise enters through a convolution that starts at 0 and is added to the latents; smaller copies of the latents
    enter the blocks ``entries`` the same way. So before training the network computes what the teacher computes.
    """

    def __init__(
        self, critic: Denoiser, taps: Sequence[str], entries: dict[str, int], maps: Sequence[torch.Size],
        latent: torch.Size, pooled_dim: int, with_noise: bool = True, flow_time: float = 0.0, **size,
    ) -> None:  # fmt: skip
        super().__init__()
        self.trunk = critic.path or critic.backend.network  # first, so that it is one run of parameters
        self.critic, self.taps, self.flow_time = critic, list(taps), flow_time
        self.noise_inlet = zero_conv(latent[0], latent[0]) if with_noise else None
        self.inlets = nn.ModuleList(zero_conv(latent[0], channels) for channels in entries.values())
        self.heads = LatentDiscriminator([shape[1] for shape in maps], pooled_dim, **size)
        # A transformer's maps all have one size: earlier ones are judged on coarser grids, as a UNet's are by nature.
        same = len({shape[2:] for shape in maps}) == 1
        coarsest = max(1, min(maps[0][2:]) // 2)  # at least two positions a side
        self.pools = [min(coarsest, 2 ** (len(maps) - 1 - i)) if same else 1 for i in range(len(maps))]
        self.patch = math.ceil(latent[1] / maps[-1][2])
        modules = dict(critic.backend.network.named_modules())
        for depth, (inlet, name) in enumerate(zip(self.inlets, entries, strict=True), 1):
            modules[name].register_forward_pre_hook(self._feed(inlet, depth), with_kwargs=True)

    @classmethod
    @torch.no_grad()
    def for_critic(
        cls, critic: Denoiser, taps: Sequence[str], entries: Sequence[str], batch: Batch, multi_scale: bool = True,
        with_noise: bool = True, flow_time: float = 0.0, **size,
    ) -> NetworkDiscriminator:  # fmt: skip
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
        for head, features in zip(made.heads.heads, made.pooled(maps), strict=True):
            head.norm.calibrate(features)
        return made

    def forward(self, latents: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        x = latents if self.noise_inlet is None else latents + self.noise_inlet(noise)
        time = x.new_full((len(x),), self.flow_time)
        sigma = self.critic.process.sigma_at_flow_time(time)
        maps = self.critic.features(x, sigma, cond, self.taps, (self, latents))
        return self.heads(self.pooled(maps), time, cond.pooled)

    def pooled(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps at the scales they are judged at."""
        pairs = zip(maps, self.pools, strict=True)
        return [m if pool == 1 else F.avg_pool2d(m, pool, ceil_mode=True) for m, pool in pairs]

    def _feed(self, inlet: nn.Module, depth: int):
        """Add a smaller copy of the latents to the image stream entering a block, in this discriminator's forwards."""

        def hook(module: nn.Module, args: tuple, kwargs: dict):
            inputs = self.critic.backend.switch.inputs
            if inputs is None or inputs[0] is not self:
                return None
            hidden, put = self.critic.backend.block_input(args, kwargs)
            return put(add_small_copy(hidden, inputs[1], inlet, depth, self.patch))

        return hook


def add_small_copy(hidden: Tensor, latents: Tensor, inlet: nn.Module, depth: int, patch: int) -> Tensor:
    """hidden + inlet(smaller latents). A map [B, C, h, w] takes them at its size; tokens [B, T + h w, C] of patches of
    ``patch`` at 1 / 2^depth of their grid, spread over it (text tokens, if any, stand first and take nothing)."""
    if hidden.ndim == 4:
        return hidden + inlet(F.adaptive_avg_pool2d(latents, hidden.shape[2:])).to(hidden.dtype)
    grid = math.ceil(latents.shape[2] / patch), math.ceil(latents.shape[3] / patch)
    small = F.adaptive_avg_pool2d(latents, [max(1, side // 2**depth) for side in grid])
    tokens = inlet(F.interpolate(small, size=grid)).flatten(2).transpose(1, 2).to(hidden.dtype)
    return hidden + F.pad(tokens, (0, 0, hidden.shape[1] - tokens.shape[1], 0))


def zero_conv(channels: int, out: int) -> nn.Conv2d:
    """A 1x1 convolution that starts at 0."""
    conv = nn.Conv2d(channels, out, 1)
    nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    return conv
