"""Which settings of the host's own KSampler give a recipe's levels on a MODEL as it is set up."""

from __future__ import annotations

import comfy.samplers
import torch

from ...distill_core.presets.explain import CORE_SAMPLERS
from ...distill_core.presets.recipe import Recipe

SCHEDULERS = ("simple", "sgm_uniform", "normal", "ddim_uniform", "beta")
CLOSE = 2e-3  # relative: the host's tables are rounded to whole timesteps


def ksampler_settings(model, recipe: Recipe) -> str:
    """A line for the recipe's explanation; "" where no scheduler of the host gives its levels."""
    steps, sampler = len(recipe.sigmas) - 1, CORE_SAMPLERS.get(recipe.sampler)
    if sampler is None:
        return ""
    sampling = model.get_model_object("model_sampling")
    for scheduler in SCHEDULERS:
        levels = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).to(recipe.sigmas)
        if levels.shape == recipe.sigmas.shape and torch.allclose(levels, recipe.sigmas, rtol=CLOSE, atol=1e-4):
            return f"KSampler: sampler_name {sampler}, scheduler {scheduler}, steps {steps}, cfg {recipe.cfg:g}"
    return ""
