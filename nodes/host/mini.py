"""The mini model shipped with the pack, loaded by the host's own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils

from ...distill_core.models.mini import ASSETS, CLASS_NAMES, load_conditioning
from .results import with_turbo_lora


def asset(name: str, folder: Path = ASSETS) -> str:
    """The path of a shipped file. Raises ValueError if the installation lacks it."""
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"{name} is missing from the pack's folder distill_core/assets/{folder.name}: install the pack again"
        )
    return str(path)


class MiniClip:
    """What encodes prompts for the mini model, as core's CLIP Text Encode asks a CLIP: the names of its classes.

    An empty text is the empty conditioning. Raises ValueError for any other.
    """

    def tokenize(self, text: str, **options) -> str:
        return text.strip()

    def encode_from_tokens_scheduled(self, tokens: str, **options) -> list:
        table, names = load_conditioning(), [*CLASS_NAMES, ""]
        if tokens not in names:
            raise ValueError(f"the mini model knows {', '.join(CLASS_NAMES)}; not {tokens!r}")
        row = names.index(tokens)
        return [[table["context"][row : row + 1], {"pooled_output": table["pooled"][row : row + 1]}]]


def load_vae(path: str, device: Any = None) -> comfy.sd.VAE:
    """device: where it computes, if not where the host wants it."""
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(path), device=device)
    vae.throw_exception_if_invalid()
    return vae


def load_mini_model(distilled: bool) -> tuple:
    """The mini teacher as a MODEL, or with the shipped LoRA on it, its VAE, and what stands for its CLIP."""
    model = comfy.sd.load_diffusion_model(asset("transformer.safetensors"))
    if distilled:
        model = with_turbo_lora(model, asset("student.safetensors"))
    vae = load_vae(asset("autoencoder.safetensors"))
    asset("conditioning.safetensors")
    return model, vae, MiniClip()
