"""E-LatentLPIPS: how different two latents look, without decoding them (Diffusion2GAN, arXiv 2405.05967, section 3.2).

    d(a, b) = E_T sum_l mean_hw sum_c w_lc (phi_l(T a) - phi_l(T b))^2

phi_l are the trunk's taps, scaled to unit length over channels; w_l >= 0 are learned; T is a random transform, the
same for both. With T left out it is LatentLPIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.noise import ItemNoise
from ..digests import weights_digest
from .transforms import PRESETS, Draws, draw, geometry, transform
from .trunk import FrozenTrunk, check_latent

EPSILON = 1e-8  # under the root of the features' length


class ELatentLPIPS(nn.Module):
    """``metric(prediction, target, random) -> [B]``: at least 0, 0 for equal latents, gradient to the prediction only.

    trunk: frozen; it fixes the latents' channels.  heads: non-negative weights [C] of the five taps.  preset: which
    transforms, one of `PRESETS`.  draws: how many are averaged.  l1: weight of the mean absolute difference of the
    untransformed latents (the published implementation adds it with weight 1).  scale, shift: (z - shift) * scale makes
    the latent that diffusion models see of the autoencoder's own z; `from_autoencoder` applies it.
    Latents are model-space [B, C, H, W], of any size from 4 x 4. Raises ValueError for a negative head, a wrong shape,
    or a preset without ``random``.
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        heads: Sequence[Tensor],
        preset: str = "bg",
        *,
        draws: int = 1,
        l1: float = 0.0,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [len(head) for head in heads]
        if widths != list(trunk.config.widths):
            raise ValueError(f"heads of widths {widths} do not fit a trunk of widths {list(trunk.config.widths)}")
        if any((head < 0).any() for head in heads):
            raise ValueError("a head has a negative weight, so the distance could be negative; clamp it to 0 first")
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {list(PRESETS)}, not {preset!r}")
        if draws < 1:
            raise ValueError("draws must be at least 1")
        self.trunk, self.preset, self.l1 = trunk, preset, l1
        self.draws = draws if preset != "none" else 1
        self.scale, self.shift = scale, shift
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head.detach().to(trunk.dtype), persistent=False)
        super().train(False)

    def identity(self) -> list[str | int | float]:
        """What tells this distance from another one: a digest of its weights, and its settings."""
        tensors = dict([*self.named_parameters(), *self.named_buffers()])  # its state dict is empty on purpose
        return [weights_digest(tensors), self.preset, self.draws, self.l1]

    def train(self, mode: bool = True) -> ELatentLPIPS:
        """Stays in eval mode, whatever the parent does."""
        return super().train(False)

    @property
    def channels(self) -> int:
        return self.trunk.config.channels

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder gives them, in the units that diffusion models and this metric use."""
        return (latents - self.shift) * self.scale

    def forward(self, prediction: Tensor, target: Tensor, random: ItemNoise | None = None) -> Tensor:
        """The distance [B], float32 (float64 if the trunk is), with the weighted L1 term."""
        terms = self.terms(prediction, target, random)
        return terms["perceptual"] + self.l1 * terms["l1"] if self.l1 else terms["perceptual"]

    def terms(self, prediction: Tensor, target: Tensor, random: ItemNoise | None = None) -> dict[str, Tensor]:
        """The two terms apart, unweighted, [B] each: ``perceptual`` and ``l1``."""
        prediction, target = self._checked(prediction, target)
        distances = []
        for _ in range(self.draws):
            pair = self._transformed(prediction, target, self._draw(random, len(prediction)))
            distances.append(total(d.mean((1, 2, 3)) for d in self._tap_maps(*pair)))
        return {"perceptual": total(distances) / self.draws, "l1": (prediction - target).abs().mean((1, 2, 3))}

    def heat_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Where they differ [B, 1, H, W], without transforms; its mean is about the plain LatentLPIPS distance."""
        pair = self._checked(prediction, target)
        return total(
            F.interpolate(d, size=prediction.shape[-2:], mode="bilinear", align_corners=False)
            for d in self._tap_maps(*pair)
        )

    def dump(self, prediction: Tensor, target: Tensor, random: ItemNoise | None = None) -> dict[str, Tensor]:
        """All numbers of one draw, to compare with another implementation.

        draws.*, matrix (input to output, pixels, origin at the centre), prediction and target, the same transformed,
        tap0-4 of both (before scaling to unit length), distance0-4 [B], distance [B], gradient of its sum.
        """
        prediction, target = self._checked(prediction, target)
        prediction = prediction.detach().requires_grad_()
        draws = self._draw(random, len(prediction))
        pair = self._transformed(prediction, target, draws)
        by_tap = [d.mean((1, 2, 3)) for d in self._tap_maps(*pair)]
        (gradient,) = torch.autograd.grad(total(by_tap).sum(), prediction)
        found = {"prediction": prediction, "target": target, "distance": total(by_tap), "gradient": gradient}
        found |= {"transformed.prediction": pair[0], "transformed.target": pair[1]}
        found |= {f"distance{i}": value for i, value in enumerate(by_tap)}
        with torch.no_grad():
            for name, x in zip(("prediction", "target"), pair, strict=True):
                found |= {f"tap{i}.{name}": tap for i, tap in enumerate(self.trunk(x))}
        if draws is not None:
            found |= {f"draws.{name}": value for name, value in draws.named().items()}
            found["matrix"] = geometry(draws, prediction.shape[-2], prediction.shape[-1], self.preset)
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def _checked(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        check_latent(prediction, self.channels, "the prediction")
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
        return prediction.to(self.trunk.dtype), target.detach().to(self.trunk.dtype)

    def _draw(self, random: ItemNoise | None, count: int) -> Draws | None:
        if self.preset == "none":
            return None
        if random is None:
            raise ValueError(f"the transforms of preset {self.preset!r} need `random`, an ItemNoise")
        if len(random.generators) != count:
            raise ValueError(f"random numbers for {len(random.generators)} items were given for a batch of {count}")
        return draw(random)

    def _transformed(self, prediction: Tensor, target: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        if draws is None:
            return prediction, target
        apply = transform(draws, self.preset, *prediction.shape[-2:])
        with torch.no_grad():
            moved = apply(target)
        return _with_little_memory(apply, prediction), moved

    def _tap_maps(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        """Distance of each tap at each of its positions [B, 1, h, w]."""
        with torch.no_grad():
            targets = [unit(tap.to(self.trunk.dtype)) for tap in self.trunk(target)]
        heads = [getattr(self, f"head{i}") for i in range(len(targets))]
        return [
            _TapDistance.apply(tap, aim, head)
            for tap, aim, head in zip(self.trunk(prediction), targets, heads, strict=True)
        ]


def total(parts: Iterable[Tensor]) -> Tensor:
    """Their sum, added up in order."""
    return reduce(add, parts)


def unit(tap: Tensor) -> Tensor:
    """Features scaled to unit length over channels."""
    return tap / (tap.square().sum(1, keepdim=True) + EPSILON).sqrt()


class _TapDistance(torch.autograd.Function):
    """sum_c w_c (unit(f) - t)^2 at each position; its gradient for f, known in the forward, is all that is kept."""

    @staticmethod
    def forward(ctx, tap: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        # tap f, target t: [B, C, h, w], t of unit length; weight w: [C]; u = f / |f|.
        features = tap.to(target.dtype)
        length = (features.square().sum(1, keepdim=True) + EPSILON).sqrt()  # [B, 1, h, w]
        features = features / length
        difference = features - target
        slope = weight.view(1, -1, 1, 1) * difference  # w (u - t), half the gradient for u
        distance = (slope * difference).sum(1, keepdim=True)  # [B, 1, h, w]
        if ctx.needs_input_grad[0]:
            # du / df = (1 - u u^T) / |f|, so the gradient for f is 2 / |f| (slope - u <u, slope>), made in place.
            del difference
            slope -= features.mul_((features * slope).sum(1, keepdim=True))
            ctx.save_for_backward(slope.mul_(2 / length).to(tap.dtype))
        return distance

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(slope.dtype), None, None


def _with_little_memory(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """apply(x), run again in the backward pass: about 1 % of the time, but it works on images up to 6 times larger."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return apply(x)
    return torch.utils.checkpoint.checkpoint(apply, x, use_reentrant=False)
