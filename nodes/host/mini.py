"""The model shipped with the pack, loaded by the host's own loaders."""

from __future__ import annotations

import comfy.sd
import comfy.utils

from ...distill_core.models.mini import ASSETS
from .results import with_turbo_lora


def asset(name: str) -> str:
    """The path of a shipped file. Raises ValueError if the installation lacks it."""
    path = ASSETS / name
    if not path.is_file():
        raise ValueError(
            f"{path.name} is missing from the pack's folder distill_core/assets/mini: install the pack again"
        )
    return str(path)


def load_mini_model(distilled: bool) -> tuple:
    """The mini teacher as a MODEL, or with the shipped LoRA on it, and its VAE."""
    model = comfy.sd.load_diffusion_model(asset("transformer.safetensors"))
    if distilled:
        model = with_turbo_lora(model, asset("student.safetensors"))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(asset("autoencoder.safetensors")))
    vae.throw_exception_if_invalid()
    return model, vae
