"""What the shipped models have in common: the kinds of their networks, and how their files are opened.

Everything lies in a folder of ``assets`` as safetensors in the layouts that ComfyUI's UNETLoader and VAELoader and
diffusers read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..diffusion.process import FlowProcess
from .backends.diffusers import DiffusersBackend


class FeatureClassifier(nn.Module):
    """A small convolutional classifier whose 64 penultimate activations are the features of the metrics.

    Input [B, C, H, W]; ``forward`` gives logits [B, classes], ``features`` gives [B, 64] before the last ReLU.
    """

    def __init__(self, channels: int, width: int, downsamplings: int, classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(downsamplings):
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU()]
            width *= 2
        self.trunk = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * width, 64)
        )
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.features(x)))


def load_classifier(net: FeatureClassifier, folder: Path, space: str) -> tuple[FeatureClassifier, dict[str, Tensor]]:
    """A fresh evaluator with its shipped weights, and its reference statistics (``mean`` [64], ``cov`` [64, 64])."""
    state = {name: value.float() for name, value in load_file(folder / f"{space}_classifier.safetensors").items()}
    reference = {name: state.pop(f"reference.{name}") for name in ("mean", "cov")}
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), reference


def new_transformer(config: Mapping[str, Any]) -> Any:
    """A fresh network of that config, diffusers' ``SD3Transformer2DModel``."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**config)


def load_transformer(net: Any, path: Path) -> Any:
    """A fresh network with the weights of a file, in float32, frozen, in eval mode."""
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return net.eval().requires_grad_(False)


def backend_of(network: Any, gradient_checkpointing: bool) -> DiffusersBackend:
    """A shipped transformer as a backend (flow, no shift)."""
    return DiffusersBackend(network, FlowProcess(1000.0, shift_alpha=1.0), gradient_checkpointing)


def new_autoencoder(width: int) -> Any:
    from diffusers import AutoencoderTiny

    widths = (width,) * 4
    return AutoencoderTiny(latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths)


def load_autoencoder(folder: Path, width: int) -> Any:
    """An autoencoder as diffusers' ``AutoencoderTiny`` with the padding channels cut off.

    The file has TAESD's 64 channels because readers of that layout fix the width; all above ``width`` are exactly zero,
    so the narrow network computes the same images several times faster.
    """
    net = new_autoencoder(width)
    padded = load_file(folder / "autoencoder.safetensors")
    state = {}
    for name, value in net.state_dict().items():
        stored = padded[taesd_key(name)].float()
        state[name] = stored[tuple(slice(n) for n in value.shape)].clone()
    net.load_state_dict(state)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def taesd_key(name: str) -> str:
    """The TAESD-layout name of an ``AutoencoderTiny`` parameter (its decoder starts with a parameter-free clamp)."""
    side, _, index, rest = name.split(".", 3)
    return f"taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"


def images_of(decoder: nn.Module, latents: Tensor) -> Tensor:
    """Latents [B, 16, H, W] -> images [B, 3, 8 H, 8 W] in [-1, 1], with gradients."""
    return decoder(latents.contiguous(memory_format=torch.channels_last)).clamp(-1, 1)


def training_log(folder: Path) -> dict:
    """How the shipped files were made: seed, iterations, losses and evaluator figures."""
    return json.loads((folder / "training.json").read_text())
