"""The shipped mini model: a small SD3 transformer and a TAESD-layout autoencoder for Fashion-MNIST.

Everything lies in ``assets/mini`` as safetensors in the layouts that ComfyUI's UNETLoader and VAELoader
and diffusers read; ``experiments/train_mini.py`` makes the files again from the public data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..diffusion.process import FlowProcess
from .backends.diffusers import DiffusersBackend
from .denoiser import Cond

ASSETS = Path(__file__).parents[1] / "assets" / "mini"
CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NULL_CLASS = len(CLASS_NAMES)  # the row of the conditioning table that means "no class"
LATENT_SHAPE = (16, 8, 8)
AUTOENCODER_WIDTH = 24  # the trained width; the file is zero-padded to the 64 channels that TAESD readers expect
GUIDANCE = 1.5  # the teacher's classifier-free guidance, chosen on its own samples (training.json)

TRANSFORMER_CONFIG = dict(
    sample_size=8,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=3,
    attention_head_dim=64,
    num_attention_heads=3,
    joint_attention_dim=64,
    caption_projection_dim=192,
    pooled_projection_dim=64,
    pos_embed_max_size=16,
)


class FeatureClassifier(nn.Module):
    """A small convolutional classifier whose 64 penultimate activations are the features of the metrics.

    Input [B, C, H, W]; ``forward`` gives class logits [B, 10], ``features`` gives [B, 64] before the last ReLU.
    """

    def __init__(self, channels: int, width: int = 32, downsamplings: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(downsamplings):
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU()]
            width *= 2
        self.trunk = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * width, 64)
        )
        self.head = nn.Linear(64, len(CLASS_NAMES))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.features(x)))


def new_classifier(space: str) -> FeatureClassifier:
    """The evaluator of a feature space: ``"latent"`` (16 channels) or ``"pixel"`` (grey images of 32 px)."""
    if space == "latent":
        return FeatureClassifier(LATENT_SHAPE[0], width=48, downsamplings=1)
    return FeatureClassifier(1, width=16, downsamplings=2)


def classifier_input(space: str, x: Tensor) -> Tensor:
    """What an evaluator sees: latents squashed as the decoder squashes them, or images [-1, 1] as grey 32 px."""
    if space == "latent":
        return torch.tanh(x / 3) * 3
    return nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)


def load_classifier(space: str) -> tuple[FeatureClassifier, dict[str, Tensor]]:
    """The shipped evaluator and its reference statistics (``mean`` [64], ``cov`` [64, 64] of real test data)."""
    state = load_file(ASSETS / f"{space}_classifier.safetensors")
    reference = {name: state.pop(f"reference.{name}") for name in ("mean", "cov")}
    net = new_classifier(space)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), reference


def load_transformer() -> Any:
    """The mini teacher as diffusers' ``SD3Transformer2DModel`` in float32, frozen, in eval mode."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
    net.load_state_dict({k: v.float() for k, v in load_file(ASSETS / "transformer.safetensors").items()})
    return net.eval().requires_grad_(False)


def load_conditioning() -> dict[str, Tensor]:
    """The class table: ``context`` [11, 2, 64] and ``pooled`` [11, 64]; row 10 is the empty conditioning."""
    return {k: v.float() for k, v in load_file(ASSETS / "conditioning.safetensors").items()}


def new_autoencoder(width: int = AUTOENCODER_WIDTH) -> Any:
    from diffusers import AutoencoderTiny

    widths = (width,) * 4
    return AutoencoderTiny(latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths)


def load_autoencoder(folder: Path = ASSETS, width: int = AUTOENCODER_WIDTH) -> Any:
    """The mini autoencoder as diffusers' ``AutoencoderTiny`` with the padding channels cut off.

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


def training_log() -> dict:
    """How the shipped files were made: seed, iterations, losses and evaluator figures."""
    return json.loads((ASSETS / "training.json").read_text())


def mini_backend(gradient_checkpointing: bool = False) -> DiffusersBackend:
    """The shipped transformer as a backend (flow, no shift)."""
    return DiffusersBackend(load_transformer(), FlowProcess(1000.0, shift_alpha=1.0), gradient_checkpointing)


def mini_conditioning() -> tuple[Cond, Cond]:
    """The ten class conditionings and the empty one (a row of its own)."""
    table = load_conditioning()
    cond = Cond(table["context"], table["pooled"])
    return cond[:NULL_CLASS], cond[NULL_CLASS:]
