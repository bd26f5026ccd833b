"""What a MODEL of the host is: family, noise process, file metadata, and how its sampling was patched.

A node before the model may have replaced its ``model_sampling`` (an object patch), so everything here asks the patcher
and not the model inside it. Tensors and models are read, never changed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_sampling
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...distill_core.diffusion.process import DiscreteProcess, FlowProcess
from ...distill_core.models.families import family_of_host_model
from ...distill_core.presets.facts import SamplingFacts
from ...distill_core.presets.recipe import describe_metadata
from .identity import LAYOUT, loras_below, weights_identity
from .loras import turbo_loras

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

    def __init__(self, model_sampling: Any) -> None:
        super().__init__(getattr(model_sampling, "multiplier", 1.0), shift_alpha_of(model_sampling) or 1.0)
        self.model_sampling = model_sampling
        self.noise_scale = getattr(model_sampling, "noise_scale", 1.0)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return self.model_sampling.noise_scaling(sigma, noise, latent_image, max_denoise)


class HostDiscrete(DiscreteProcess):
    """The host's eps or v ``model_sampling`` over a table of timesteps, with what training asks of a process."""

    def __init__(self, model_sampling: Any) -> None:
        self.model_sampling, self.prediction = model_sampling, prediction_of(model_sampling)
        self._set_table(model_sampling.sigmas.detach().float().cpu().clone())
        for name in ("noise_scaling", "calculate_input", "calculate_denoised"):
            setattr(self, name, getattr(model_sampling, name))
        usual = comfy.model_sampling.ModelSamplingDiscrete.timestep  # ours is the same, with its table on the device
        if type(model_sampling).timestep is not usual:
            self.timestep = model_sampling.timestep


def is_flow(model_sampling: Any) -> bool:
    return isinstance(model_sampling, comfy.model_sampling.CONST)


def process_of(model: ModelPatcher) -> Any:
    """The noise process of a MODEL as `distill_core` wants it: sigma, timestep, noise_scaling."""
    model_sampling = model.get_model_object("model_sampling")
    return HostFlow(model_sampling) if is_flow(model_sampling) else model_sampling


def training_process_of(model: ModelPatcher) -> HostFlow | HostDiscrete:
    """The noise process of a MODEL for training. Raises ValueError for one that is not flow, eps or v."""
    model_sampling = model.get_model_object("model_sampling")
    if prediction_of(model_sampling) == "flow":
        return HostFlow(model_sampling)
    if prediction_of(model_sampling) in ("eps", "v") and isinstance(
        model_sampling, comfy.model_sampling.ModelSamplingDiscrete
    ):
        return HostDiscrete(model_sampling)
    patched = "model_sampling" in model.object_patches
    cure = ". Connect the model from before its ModelSampling node, or remove that node" if patched else ""
    raise ValueError(
        f"a model with {prediction_of(model_sampling)} sampling ({type(model_sampling).__mro__[1].__name__}) cannot be "
        f"distilled; flow models and models with 1000 steps of eps or v prediction can{cure}"
    )


def family_of(model: ModelPatcher) -> str | None:
    """The family in `distill_core.models.families`, or None."""
    return family_of_host_model(cls.__name__ for cls in type(model.model.model_config).__mro__)


def family_name(model: ModelPatcher) -> str:
    """The family in the table of presets, or the name of the network's class."""
    return family_of(model) or type(model.model.diffusion_model).__name__


def facts_of(model: ModelPatcher) -> SamplingFacts:
    """All that recipes and the doctor ask of a MODEL."""
    now, native = model.get_model_object("model_sampling"), native_sampling(model)
    metadata, loras = file_metadata(model), turbo_loras(model)
    described = [describe_metadata(said) for said in (metadata, *(lora.metadata for lora in loras))]
    origin = {}
    if any(said.get("base_layout") == LAYOUT for said in described):  # digests cost some tenths of a second
        origin = {"base": weights_identity(model), "layout": LAYOUT, "below": loras_below(model)}
    return SamplingFacts(
        family=family_of(model),
        process=process_of(model),
        table=None if is_flow(now) else now.sigmas.float().cpu(),
        metadata=metadata,
        loras=loras,
        timestep_of=now.timestep,
        native_timestep_of=native.timestep,
        patched=native is not now,
        shift_alpha=shift_alpha_of(now),
        native_shift_alpha=shift_alpha_of(native),
        audio_shift=getattr(now, "audio_shift", None),
        noise_scale=getattr(now, "noise_scale", 1.0),
        native_noise_scale=getattr(native, "noise_scale", 1.0),
        prediction=prediction_of(now),
        native_prediction=prediction_of(native),
        guidance_embedded=bool(model.model.model_config.unet_config.get("guidance_embed", False)),
        strengths=lora_strengths(model),
        **origin,
    )


def lora_strengths(model: ModelPatcher) -> tuple[float, ...] | None:
    """The strengths of the patches on a MODEL's weights, each once; None where they are injected (bypass LoRAs)."""
    if model.injections and not model.patches:
        return None
    return tuple(sorted({float(patch[0]) for patches in model.patches.values() for patch in patches if patch[0]}))


def guidance_of(conditioning: list) -> float | None:
    """The embedded guidance of a CONDITIONING that all its parts have, None if they have none or several."""
    values = {options.get("guidance") for _, options in conditioning}
    return values.pop() if len(values) == 1 else None


def native_sampling(model: ModelPatcher) -> Any:
    """The ``model_sampling`` that the family has by nature: the model's own, or made anew if a node replaced it."""
    if "model_sampling" not in model.object_patches:
        return model.get_model_object("model_sampling")
    return comfy.model_base.model_sampling(model.model.model_config, model.model.model_type)


def with_native_sampling(
    model: ModelPatcher, shift_alpha: float | None, audio_shift: float | None = None
) -> ModelPatcher:
    """A clone of MODEL with the sampling of its family and, on flow models, the given shift factors.

    The noise scale that a node set stays, and the sound's shift stays what it is by nature where none is given.
    """
    sampling = native_sampling(model)
    if shift_alpha is not None and isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        sampling.set_parameters(shift=math.log(shift_alpha))
    elif shift_alpha is not None and isinstance(sampling, comfy.model_sampling.ModelSamplingAV):
        sound = audio_shift or sampling.audio_shift
        sampling.set_parameters(shift=shift_alpha, audio_shift=sound, multiplier=sampling.multiplier)
    elif shift_alpha is not None and isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        sampling.set_parameters(shift=shift_alpha, multiplier=sampling.multiplier)
    scale = getattr(model.get_model_object("model_sampling"), "noise_scale", None)
    if scale is not None and hasattr(sampling, "set_noise_scale"):
        sampling.set_noise_scale(scale)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def shift_alpha_of(model_sampling: Any) -> float | None:
    """The shift as a factor: the host keeps its logarithm in some classes and itself in others."""
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingFlux):
        return math.exp(model_sampling.shift)
    if isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        return float(model_sampling.shift)
    return None


def prediction_of(model_sampling: Any) -> str:
    names = [cls.__name__ for cls in type(model_sampling).__mro__]
    return next((PREDICTIONS[name] for name in names if name in PREDICTIONS), "unknown")


def file_of(model: ModelPatcher) -> Path | None:
    """The file a MODEL was loaded from, None where its loader does not tell."""
    source = getattr(model, "cached_patcher_init", None)  # (loader, its arguments): how the host would load it again
    path = source[1][0] if source and source[1] else None
    return Path(path) if isinstance(path, str) else None


def file_metadata(model: ModelPatcher) -> dict[str, str]:
    """Metadata of the file a MODEL was loaded from."""
    path = file_of(model)
    if path is None or path.suffix != ".safetensors":
        return {}
    try:
        now = path.stat()
        return _metadata(str(path), now.st_mtime_ns, now.st_size)
    except (OSError, SafetensorError):
        return {}  # moved or replaced since it was loaded: the model in memory is still good


@lru_cache(maxsize=32)
def _metadata(path: str, written: int, size: int) -> dict[str, str]:
    """Of the file at a path as it was then: to open one takes as long as all else that is asked of a MODEL."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
