"""Autoencoders for calibration and for the Latent Perceptual Loss: images <-> model-space latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import opening
from ..files import read_json
from ..models import mini
from ..models.backends.diffusers_folders import only_variant
from ..models.families import LatentSpace
from ..models.features import collect_taps
from ..models.lora import LoraSwitch
from .weights import SPACES

MINI_SPACE = SPACES["sd3"]  # the host treats the mini model as one of SD3's family


class Autoencoder:
    """encode: images [B, 3, H, W] in [-1, 1] -> model-space latents.  decode: back.  Both frozen.

    network: diffusers' AutoencoderKL or AutoencoderTiny.  space: how its latents relate to those of diffusion models;
    ``raw`` says whether the network's own latents are already model-space (the mini model's are).
    """

    def __init__(self, network: Any, space: LatentSpace, raw: bool = False) -> None:
        self.network, self.space, self.raw = network.eval().requires_grad_(False), space, raw
        self.stages = decoder_stages(network.decoder)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        images = images.to(self._like()).contiguous(memory_format=torch.channels_last)
        found = self.network.encode(images)
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return (latents if self.raw else (latents - self.space.shift) * self.space.scale).float().contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> images in [-1, 1]; gradients flow to the latents."""
        return self.network.decode(self._own(latents)).sample.float().clamp(-1, 1)

    def features(self, latents: Tensor) -> list[Tensor]:
        """Outputs of the decoder's stages, smallest first; what comes after the last stage is not computed."""
        latents = self._own(latents)
        return collect_taps(self.network, self.stages, lambda: self.network.decode(latents), LoraSwitch())

    def _like(self) -> Tensor:
        return next(self.network.parameters())

    def _own(self, latents: Tensor) -> Tensor:
        own = latents if self.raw else latents / self.space.scale + self.space.shift
        return own.to(self._like()).contiguous(memory_format=torch.channels_last)


def decoder_stages(decoder: Any) -> list[str]:
    """Names of the decoder modules that end a resolution, smallest first. Raises ValueError for an unknown layout."""
    if hasattr(decoder, "up_blocks"):
        return ["decoder.mid_block", *(f"decoder.up_blocks.{i}" for i in range(len(decoder.up_blocks)))]
    layers = list(getattr(decoder, "layers", []))
    ends = [i - 1 for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
    if not ends:
        raise ValueError(f"the decoder {type(decoder).__name__} has no stages that are known here")
    return [f"decoder.layers.{i}" for i in [*ends, len(layers) - 2]]


def open_autoencoder(path: str) -> Autoencoder:
    """ "mini", or a diffusers folder of an AutoencoderKL or AutoencoderTiny (a pipeline's ``vae`` folder).

    Raises ValueError for another folder.
    """
    if path == "mini":
        return Autoencoder(mini.load_autoencoder(), MINI_SPACE, raw=True)
    import diffusers

    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f'{path} has no config.json; give the vae folder of a diffusers pipeline, or "mini"')
    config = read_json(file, "download it again")
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(f"{path} holds a {kind}; known are AutoencoderKL and AutoencoderTiny")
    with opening(path, f"an {kind}"):
        variant = only_variant([Path(path)])
        network = getattr(diffusers, kind).from_pretrained(path, local_files_only=True, variant=variant)
    facts = network.config
    space = LatentSpace(facts.latent_channels, facts.scaling_factor, getattr(facts, "shift_factor", None) or 0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Autoencoder(network.to(device), space)
