"""The scenes models (`distill_core.models.scenes`) as MODELs: of text, and those that are shown a picture beside it.

The host knows SD3 networks of 16 input channels alone. Those with more are told to it by a class of its own kind, for
as long as it loads one. What its nodes InpaintModelConditioning and InstructPixToPixConditioning write then reaches
the network as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import comfy.model_base
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor, nn

from ...distill_core.models import scenes
from .mini import asset, load_vae


class InpaintingSD3(comfy.model_base.SD3):
    """Its network takes a mask and the latent of the masked picture beside a latent.

    A position of the mask is 1 where any of its pixels is. Without a mask and a picture all is hidden.
    """

    def __init__(self, model_config: Any, device: Any = None) -> None:
        super().__init__(model_config, device=device)
        self.set_inpaint()
        self.blank_inpaint_image_like = self.grey_like

    def concat_cond(self, **given: Any) -> Tensor:
        if (mask := given.get("concat_mask")) is not None:
            sides = given["noise"].shape[-2:]
            given["concat_mask"] = nn.functional.adaptive_max_pool2d(mask.reshape(-1, 1, *mask.shape[-2:]), sides)
        return super().concat_cond(**given)

    def grey_like(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, H, W] of mid-grey pictures, as many as ``latents`` and as large."""
        height, width = (scenes.PIXELS * side for side in latents.shape[-2:])
        grey = load_scenes_vae(torch.device("cpu")).encode(torch.full((1, height, width, 3), 0.5))
        return self.process_latent_in(grey).to(latents).expand_as(latents)


class EditingSD3(comfy.model_base.IP2P, comfy.model_base.SD3):
    """Its network takes the latent of the picture that is edited beside a latent; zeros without one."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        super().__init__(model_config, device=device)
        self.process_ip2p_image_in = self.process_latent_in

    def concat_cond(self, **given: Any) -> Tensor:
        if given.get("concat_latent_image") is None:
            return torch.zeros_like(given["noise"], device=given["device"])
        return super().concat_cond(**given)


MODELS = {scenes.INPAINTING: InpaintingSD3, scenes.EDITING: EditingSD3}


def config_of(kind: str) -> type[comfy.supported_models.SD3]:
    """The host's description of such a model, by which it finds the class for a file."""

    class ScenesSD3(comfy.supported_models.SD3):
        unet_config = comfy.supported_models.SD3.unet_config | {"in_channels": scenes.CHANNELS[kind]}
        sampling_settings = {"shift": 1.0}  # as it was trained

        def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Any:
            return MODELS[kind](self, device)

    return ScenesSD3


@contextmanager
def known(kind: str) -> Iterator[None]:
    """The host loads models of this kind inside."""
    table, config = comfy.supported_models.models, config_of(kind)
    table.append(config)
    try:
        yield
    finally:
        table.remove(config)


class ScenesClip:
    """What encodes prompts for the scenes models, as core's CLIP Text Encode asks a CLIP: any of their words."""

    def tokenize(self, text: str, **options) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **options) -> list:
        return scenes_conditioning(tokens)


def scenes_conditioning(text: str) -> list:
    """The host's CONDITIONING of a prompt. Raises ValueError for a word that the scenes models do not know."""
    asset("text_encoder.safetensors", scenes.ASSETS)
    cond = scenes.encode_text([text])
    return [[cond.context, {"pooled_output": cond.pooled}]]


def cropped_pos_embed(self: Any, hw: Sequence[int], device: Any = None) -> Any:
    return type(self).cropped_pos_embed(self, [side - 1 for side in hw], device)


def unpatchify(self: Any, x: Any, hw: Sequence[int]) -> Any:
    return type(self).unpatchify(self, x, [side - 1 for side in hw])


def load_scenes_network(kind: str = scenes.TEXT, **options: Any) -> Any:
    """A transformer of `scenes.MODELS` as a MODEL; options are the host's, which loads it again for a copy.

    It has a token for each position. ComfyUI's SD3 network rounds sides up as for patches of two, ``(side + 1) // 1``,
    and so counts one row and one column too many; its two methods that do so are told sides smaller by one.
    """
    path = asset(scenes.MODELS[kind], scenes.ASSETS)
    if kind == scenes.TEXT:
        model = comfy.sd.load_diffusion_model(path, **options)
    else:
        with known(kind):
            model = comfy.sd.load_diffusion_model(path, **options)
    network = model.model.diffusion_model
    for method in (cropped_pos_embed, unpatchify):
        setattr(network, method.__name__, MethodType(method, network))
    model.cached_patcher_init = (load_scenes_network, (kind,))
    return model


def load_scenes_vae(device: Any = None) -> comfy.sd.VAE:
    return load_vae(asset("autoencoder.safetensors", scenes.ASSETS), device)


def load_scenes_model(kind: str = scenes.TEXT) -> tuple:
    """A scenes model as a MODEL, its VAE, and what stands for its CLIP. Raises ValueError for a kind that is none."""
    if kind not in scenes.MODELS:
        raise ValueError(f"kind must be one of {', '.join(scenes.MODELS)}, not {kind!r}")
    return load_scenes_network(kind), load_scenes_vae(), ScenesClip()
