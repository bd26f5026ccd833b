"""The models shipped with the pack, loaded by the host's own loaders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import comfy.sd
import comfy.utils

from ...distill_core.models import scenes
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


class ScenesClip:
    """What encodes prompts for the scenes model, as core's CLIP Text Encode asks a CLIP: any of its words."""

    def tokenize(self, text: str, **options) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **options) -> list:
        return scenes_conditioning(tokens)


def scenes_conditioning(text: str) -> list:
    """The host's CONDITIONING of a prompt. Raises ValueError for a word that the scenes model does not know."""
    asset("text_encoder.safetensors", scenes.ASSETS)
    cond = scenes.encode_text([text])
    return [[cond.context, {"pooled_output": cond.pooled}]]


def load_vae(path: str) -> comfy.sd.VAE:
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(path))
    vae.throw_exception_if_invalid()
    return vae


def cropped_pos_embed(self: Any, hw: Sequence[int], device: Any = None) -> Any:
    return type(self).cropped_pos_embed(self, [side - 1 for side in hw], device)


def unpatchify(self: Any, x: Any, hw: Sequence[int]) -> Any:
    return type(self).unpatchify(self, x, [side - 1 for side in hw])


def load_scenes_network(**options: Any) -> Any:
    """The scenes transformer as a MODEL; options are the host's, which loads it again for a copy.

    It has a token for each position. ComfyUI's SD3 network rounds sides up as for patches of two, ``(side + 1) // 1``,
    and so counts one row and one column too many; its two methods that do so are told sides smaller by one.
    """
    model = comfy.sd.load_diffusion_model(asset("transformer.safetensors", scenes.ASSETS), **options)
    network = model.model.diffusion_model
    for method in (cropped_pos_embed, unpatchify):
        setattr(network, method.__name__, MethodType(method, network))
    model.cached_patcher_init = (load_scenes_network, ())
    return model


def load_scenes_model() -> tuple:
    """The scenes model as a MODEL, its VAE, and what stands for its CLIP."""
    return load_scenes_network(), load_vae(asset("autoencoder.safetensors", scenes.ASSETS)), ScenesClip()


def load_mini_model(distilled: bool) -> tuple:
    """The mini teacher as a MODEL, or with the shipped LoRA on it, its VAE, and what stands for its CLIP."""
    model = comfy.sd.load_diffusion_model(asset("transformer.safetensors"))
    if distilled:
        model = with_turbo_lora(model, asset("student.safetensors"))
    vae = load_vae(asset("autoencoder.safetensors"))
    asset("conditioning.safetensors")
    return model, vae, MiniClip()
