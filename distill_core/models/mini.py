"""The shipped mini model: a small SD3 transformer and a TAESD-layout autoencoder for Fashion-MNIST.

Everything lies in ``assets/mini`` as safetensors in the layouts that ComfyUI's UNETLoader and VAELoader
and diffusers read; ``experiments/train_mini.py`` makes the files again from the public data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import shipped
from .backends.diffusers import DiffusersBackend
from .denoiser import Cond
from .shipped import FeatureClassifier

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

# Two blocks of width 128: 29 % of the weights.
SMALL_CONFIG = TRANSFORMER_CONFIG | dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128)
SMALL = ASSETS / "small.safetensors"


def new_classifier(space: str) -> FeatureClassifier:
    """The evaluator of a feature space: ``"latent"`` (16 channels) or ``"pixel"`` (grey images of 32 px)."""
    if space == "latent":
        return FeatureClassifier(LATENT_SHAPE[0], 48, 1, len(CLASS_NAMES), dropout=0.3)
    return FeatureClassifier(1, 16, 2, len(CLASS_NAMES), dropout=0.3)


def classifier_input(space: str, x: Tensor) -> Tensor:
    """What an evaluator sees: latents squashed as the decoder squashes them, or images [-1, 1] as grey 32 px."""
    if space == "latent":
        return torch.tanh(x / 3) * 3
    return nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)


def load_classifier(space: str) -> tuple[FeatureClassifier, dict[str, Tensor]]:
    """The shipped evaluator and its reference statistics (``mean`` [64], ``cov`` [64, 64] of real test data)."""
    return shipped.load_classifier(new_classifier(space), ASSETS, space)


def load_transformer(small: bool = False) -> Any:
    """The mini teacher as diffusers' ``SD3Transformer2DModel`` in float32, frozen, in eval mode; small: another one of
    `SMALL_CONFIG`, trained likewise on the same latents and conditioning."""
    config, file = (SMALL_CONFIG, SMALL) if small else (TRANSFORMER_CONFIG, ASSETS / "transformer.safetensors")
    return shipped.load_transformer(shipped.new_transformer(config), file)


def load_conditioning() -> dict[str, Tensor]:
    """The class table: ``context`` [11, 2, 64] and ``pooled`` [11, 64]; row 10 is the empty conditioning."""
    return {k: v.float() for k, v in load_file(ASSETS / "conditioning.safetensors").items()}


def load_autoencoder() -> Any:
    """The autoencoder as diffusers' ``AutoencoderTiny`` with the padding channels cut off."""
    return shipped.load_autoencoder(ASSETS, AUTOENCODER_WIDTH)


def training_log() -> dict:
    """How the shipped files were made: seed, iterations, losses and evaluator figures."""
    return shipped.training_log(ASSETS)


def mini_backend(gradient_checkpointing: bool = False, small: bool = False) -> DiffusersBackend:
    """A shipped transformer as a backend (flow, no shift)."""
    return shipped.backend_of(load_transformer(small), gradient_checkpointing)


def mini_conditioning() -> tuple[Cond, Cond]:
    """The ten class conditionings and the empty one (a row of its own)."""
    table = load_conditioning()
    cond = Cond(table["context"], table["pooled"])
    return cond[:NULL_CLASS], cond[NULL_CLASS:]
