"""What a MODEL of the host is: family, noise process, file metadata, and how its sampling was patched.

A node before the model may have replaced its ``model_sampling`` (an object patch), so everything here asks the patcher
and not the model inside it. Tensors and models are read, never changed.
"""

from __future__ import annotations

import math
from pathlib import Path

import comfy.model_base
import comfy.model_sampling
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...distill_core.diffusion.process import DiscreteProcess, FlowProcess
from ...distill_core.models.families import family_of_host_model
from ...distill_core.presets.checks import SamplingFacts

# The host's prediction classes (comfy/model_sampling.py, nodes_model_advanced.py) in words.
PREDICTIONS = {
    "X0": "x0",
    "LCM": "lcm",
    "V_PREDICTION_DDPM": "v",
    "EDM": "edm",
    "V_PREDICTION": "v",
    "CONST": "flow",
    "COSMOS_RFLOW": "cosmos flow",
    "IMG_TO_IMG": "image to image",
    "IMG_TO_IMG_FLOW": "image to image",
    "EPS": "eps",
}


class HostFlow(FlowProcess):
    """The host's flow ``model_sampling``, which may scale the noise, as a process that our samplers know as flow."""

    def __init__(self, model_sampling) -> None:
        super().__init__(getattr(model_sampling, "multiplier", 1.0), shift_alpha_of(model_sampling) or 1.0)
        self.model_sampling = model_sampling

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return self.model_sampling.noise_scaling(sigma, noise, latent_image, max_denoise)


class HostDiscrete(DiscreteProcess):
    """The host's eps or v ``model_sampling`` over a table of timesteps, with what training asks of a process."""

    def __init__(self, model_sampling) -> None:
        self.model_sampling, self.prediction = model_sampling, prediction_of(model_sampling)
        self.sigmas = model_sampling.sigmas.detach().float().cpu().clone()
        self.log_sigmas = self.sigmas.log()
        for name in ("noise_scaling", "calculate_input", "calculate_denoised", "timestep"):
            setattr(self, name, getattr(model_sampling, name))


def is_flow(model_sampling) -> bool:
    return isinstance(model_sampling, comfy.model_sampling.CONST)


def process_of(model):
    """The noise process of a MODEL as `distill_core` wants it: sigma, timestep, noise_scaling."""
    model_sampling = model.get_model_object("model_sampling")
    return HostFlow(model_sampling) if is_flow(model_sampling) else model_sampling


def training_process_of(model) -> HostFlow | HostDiscrete:
    """The noise process of a MODEL for training. Raises ValueError for one that is not flow, eps or v."""
    model_sampling = model.get_model_object("model_sampling")
    if prediction_of(model_sampling) == "flow":
        return HostFlow(model_sampling)
    if prediction_of(model_sampling) in ("eps", "v") and isinstance(
        model_sampling, comfy.model_sampling.ModelSamplingDiscrete
    ):
        return HostDiscrete(model_sampling)
    raise ValueError(
        f"a model with {prediction_of(model_sampling)} sampling ({type(model_sampling).__mro__[1].__name__}) cannot be "
        "distilled; flow models and models with 1000 steps of eps or v prediction can"
    )


def family_of(model) -> str | None:
    """The family in `distill_core.models.families`, or None."""
    return family_of_host_model(cls.__name__ for cls in type(model.model.model_config).__mro__)


def facts_of(model) -> SamplingFacts:
    """All that recipes and the doctor ask of a MODEL."""
    now, native = model.get_model_object("model_sampling"), native_sampling(model)
    return SamplingFacts(
        family=family_of(model),
        process=process_of(model),
        table=None if is_flow(now) else now.sigmas.float().cpu(),
        metadata=metadata_of(model),
        timestep_of=now.timestep,
        native_timestep_of=native.timestep,
        patched=native is not now,
        shift_alpha=shift_alpha_of(now),
        native_shift_alpha=shift_alpha_of(native),
        prediction=prediction_of(now),
        native_prediction=prediction_of(native),
        guidance_embedded=bool(model.model.model_config.unet_config.get("guidance_embed", False)),
    )


def native_sampling(model):
    """The ``model_sampling`` that the family has by nature: the model's own, or made anew if a node replaced it."""
    if "model_sampling" not in model.object_patches:
        return model.get_model_object("model_sampling")
    return comfy.model_base.model_sampling(model.model.model_config, model.model.model_type)


def with_native_sampling(model, shift_alpha: float | None):
    """A clone of MODEL with the sampling of its family and, on flow models, the given shift factor."""
    sampling = native_sampling(model)
    if shift_alpha is not None and isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        sampling.set_parameters(shift=math.log(shift_alpha))
    elif shift_alpha is not None and isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        sampling.set_parameters(shift=shift_alpha, multiplier=sampling.multiplier)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def shift_alpha_of(model_sampling) -> float | None:
    """The shift as a factor: the host keeps its logarithm in some classes and itself in others."""
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingFlux):
        return math.exp(model_sampling.shift)
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        return float(model_sampling.shift)
    return None


def prediction_of(model_sampling) -> str:
    names = [cls.__name__ for cls in type(model_sampling).__mro__]
    return next((PREDICTIONS[name] for name in names if name in PREDICTIONS), "unknown")


def metadata_of(model) -> dict[str, str]:
    """Metadata of the file a MODEL was loaded from, overlaid with that of the last LoRA that carried any."""
    lora = model.attachments.get("lora_metadata") or {}
    return {**_file_metadata(model), **lora}


def _file_metadata(model) -> dict[str, str]:
    source = getattr(model, "cached_patcher_init", None)  # (loader, its arguments): how the host would load it again
    path = source[1][0] if source and source[1] else None
    if not isinstance(path, str) or Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # moved or replaced since it was loaded: the model in memory is still good
