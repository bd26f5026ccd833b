"""Seed variety as a wrapper of the host's network call: only the first step of a sampling run is touched."""

from __future__ import annotations

import zlib

import comfy.model_base
import comfy.patcher_extension
import torch
from torch import Tensor

from ...distill_core.diffusion.noise import ItemNoise
from ...distill_core.diffusion.variety import noised_prompt, stronger_noise
from .sampling import ImageByImage

PROMPT, NOISE = "prompt noise", "stronger noise"
AIDS = (PROMPT, NOISE)
SIZES = 6 * 256  # numbers at the end of SDXL's pooled input that say sizes and crops
POSITIVE = 0  # the host's number for it in cond_or_uncond


def with_variety(model, aid: str, strength: float):
    """A clone of MODEL whose first step in each sampling run is varied."""
    clone = model.clone()
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    clone.add_wrapper_with_key(kind, ImageByImage.KEY, FirstStep(aid, strength, model.model))
    return clone


class FirstStep:
    """The wrapper. An image's draws come from its own noised latent, so they do not depend on the rest of its batch."""

    def __init__(self, aid: str, strength: float, model: comfy.model_base.BaseModel) -> None:
        self.aid, self.strength = aid, strength
        self.tail = SIZES if isinstance(model, comfy.model_base.SDXL) else 0

    def __call__(self, network, x, t, c_concat, c_crossattn, control, transformer_options, **conditions) -> Tensor:
        first = transformer_options["sample_sigmas"][0]
        if float(t[0]) >= float(first) * (1 - 1e-4):
            if self.aid == PROMPT:
                c_crossattn, conditions = self._prompts(x, c_crossattn, conditions, transformer_options)
            elif _is_pure_noise(network.class_obj, first):
                x = stronger_noise(x, self.strength)
        return network(x, t, c_concat, c_crossattn, control, transformer_options, **conditions)

    def _prompts(self, x: Tensor, context: Tensor, conditions: dict, options: dict) -> tuple[Tensor, dict]:
        groups = options["cond_or_uncond"]
        images = len(x) // len(groups)
        seeds = [zlib.crc32(row.float().cpu().numpy().tobytes()) for row in x[:images]]
        pooled = conditions.get("y")
        for group, which in enumerate(groups):
            if which != POSITIVE:
                continue
            rows = slice(group * images, (group + 1) * images)
            noise = ItemNoise(0, seeds)
            context = _replaced(
                context, rows, noised_prompt(context[rows], noise.normal_like(context[rows]), self.strength)
            )
            if pooled is not None:
                part = pooled[rows, : pooled.shape[1] - self.tail]
                varied = noised_prompt(part, noise.normal_like(part), self.strength)
                pooled = _replaced(pooled, rows, torch.cat([varied, pooled[rows, part.shape[1] :]], 1))
        return context, conditions if pooled is None else {**conditions, "y": pooled}


def _replaced(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    return torch.cat([whole[: rows.start], part, whole[rows.stop :]])


def _is_pure_noise(model: comfy.model_base.BaseModel, sigma: Tensor) -> bool:
    """Whether nothing of a picture is in a latent at this level (image to image starts lower)."""
    return float(sigma) >= 0.99 * float(model.model_sampling.sigma_max)
