"""The network under the metric: VGG16 with batch normalisation on latents, without its first three max-pools.

Zhang et al. (2018, arXiv 1801.03924) compare images at five depths of VGG16; Diffusion2GAN (arXiv 2405.05967, section
3.2) trains the same network on latents, which are already 8 times smaller than the image, so the first three poolings
go. `TrainableTrunk` is trained; `FrozenTrunk` has the normalisation folded into the convolutions and keeps, for the
backward pass, one bit a value (stored as a byte) instead of the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from ..diffusion.process import expand_like

DEPTHS = (2, 2, 3, 3, 3)  # convolutions before each of the five taps
POOLED = (False, False, False, True, True)  # whether a max-pool stands between them and the tap
SMALLEST = 4  # pixels: two poolings must leave something


@dataclass(frozen=True)
class TrunkConfig:
    """channels: of the latent.  widths: channels of the five taps; the default is VGG16's, as in published weights."""

    channels: int
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)

    def __post_init__(self) -> None:
        if self.channels < 1 or len(self.widths) != len(DEPTHS) or min(self.widths) < 1:
            raise ValueError(f"a trunk needs at least one channel and {len(DEPTHS)} positive widths, not {self}")

    def layers(self) -> list[tuple[int, int]]:
        """(channels in, channels out) of the thirteen convolutions."""
        outs = [width for width, depth in zip(self.widths, DEPTHS, strict=True) for _ in range(depth)]
        return list(zip([self.channels, *outs[:-1]], outs, strict=True))


def check_latent(x: Tensor, channels: int, name: str = "the latent") -> None:
    """Raises ValueError for what is not a batch of image latents [B, channels, H, W] of at least 4 x 4."""
    if x.ndim == 5:
        raise ValueError(
            f"{name} is a video latent {list(x.shape)}; the metric compares images: pass its frames as a batch "
            "[B T, C, H, W]"
        )
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name} must be [B, {channels}, H, W] for these weights, not {list(x.shape)}; take the weights of the "
            "latent's own autoencoder"
        )
    if min(x.shape[-2:]) < SMALLEST:
        raise ValueError(f"{name} must be at least {SMALLEST} x {SMALLEST}, not {list(x.shape[-2:])}")


class TrainableTrunk(nn.Module):
    """Convolutions with batch normalisation; input [B, channels, H, W], output the five taps, largest first."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in config.layers())
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in config.layers())
        for name, parameter in self.convs.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps, layers = [], iter(zip(self.convs, self.norms, strict=True))
        for depth, pooled in zip(DEPTHS, POOLED, strict=True):
            for _ in range(depth):
                conv, norm = next(layers)
                x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if pooled else x
            taps.append(x)
        return taps


class _FrozenConvReLU(torch.autograd.Function):
    """relu(conv(x)) with fixed weights. Only where the output is positive is kept; autograd would keep x and y."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, padding=1).relu_()
        ctx.save_for_backward(weight, y > 0)
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, positive = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, grad * positive, padding=1), None, None


class FrozenTrunk(nn.Module):
    """`TrainableTrunk` in eval mode with the normalisation folded in; gradients flow to the input only.

    state: of a `TrainableTrunk`.  The weights are buffers outside the state dict, so that no parent trains, saves or
    unfreezes them.  checkpointing: recompute each of the five slices in the backward pass.
    Under autocast the convolutions run in its dtype; folding is done in float64.
    """

    def __init__(self, config: TrunkConfig, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        for i in range(len(config.layers())):
            weight, bias = fold(state, i)
            self.register_buffer(f"weight{i}", weight.to(dtype), persistent=False)
            self.register_buffer(f"bias{i}", bias.to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        """The five taps one after the other, so that a caller can let go of each before the next."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else self.dtype
        x, start = x.to(dtype), 0
        for depth, pooled in zip(DEPTHS, POOLED, strict=True):
            if self.checkpointing and x.requires_grad and torch.is_grad_enabled():
                x = checkpoint(self._slice, x, start, depth, pooled, use_reentrant=False)
            else:
                x = self._slice(x, start, depth, pooled)
            yield x
            start += depth

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("weight0").dtype

    def _slice(self, x: Tensor, start: int, depth: int, pooled: bool) -> Tensor:
        for i in range(start, start + depth):
            weight, bias = (getattr(self, f"{name}{i}").to(x.dtype) for name in ("weight", "bias"))
            if x.requires_grad and torch.is_grad_enabled():
                x = _FrozenConvReLU.apply(x, weight, bias)
            else:
                x = F.conv2d(x, weight, bias, padding=1).relu_()
        return F.max_pool2d(x, 2) if pooled else x


def fold(state: dict[str, Tensor], layer: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of a convolution followed by its batch normalisation in eval mode."""
    value = {
        name: state[f"{kind}s.{layer}.{name.removeprefix(kind + '_')}"].double()
        for kind, names in {
            "conv": ("weight", "bias"),
            "norm": ("weight", "bias", "running_mean", "running_var"),
        }.items()
        for name in (f"{kind}_{n}" for n in names)
    }
    gain = value["norm_weight"] / (value["norm_running_var"] + eps).sqrt()
    bias = (value["conv_bias"] - value["norm_running_mean"]) * gain + value["norm_bias"]
    return value["conv_weight"] * expand_like(gain, value["conv_weight"]), bias
