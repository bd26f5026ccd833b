"""The second shipped mini model, of scenes: "striped yellow ring on cobbles", in colour and with fine detail.

An SD3 transformer, a TAESD-layout autoencoder and a small text encoder of its own, as safetensors in ``assets/scenes``;
``experiments/train_scenes.py`` makes them again from pictures that a program draws (`data.scenes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import shipped
from .backends.diffusers import DiffusersBackend
from .denoiser import Cond
from .shipped import FeatureClassifier

ASSETS = Path(__file__).parents[1] / "assets" / "scenes"
GROUPS: dict[str, tuple[str, ...]] = {
    "texture": ("plain", "striped", "checkered"),
    "colour": ("red", "yellow", "green", "blue", "white"),
    "shape": ("ring", "triangle", "star", "cross"),
    "ground": ("cobbles", "waves"),
}
WORDS = tuple(word for group in GROUPS.values() for word in group)
SILENT = ("a", "on", "the")  # read over
SIZE = 64  # pixels of a side
PIXELS = 8  # of a side of a latent's position
LATENT_SHAPE = (16, 8, 8)
AUTOENCODER_WIDTH = 32  # the trained width; the file is zero-padded to the 64 channels that TAESD readers expect
GUIDANCE = 2.0
TOKENS, TEXT_WIDTH = 6, 64

TRANSFORMER_CONFIG = dict(
    sample_size=8,
    patch_size=1,
    in_channels=16,
    out_channels=16,
    num_layers=3,
    attention_head_dim=64,
    num_attention_heads=3,
    joint_attention_dim=TEXT_WIDTH,
    caption_projection_dim=192,
    pooled_projection_dim=TEXT_WIDTH,
    pos_embed_max_size=16,
    dual_attention_layers=(0, 1, 2),
    qk_norm="rms_norm",
)


def caption(words: Sequence[int]) -> str:
    """The caption of a scene's four words, indices into `GROUPS`."""
    texture, colour, shape, ground = (group[i] for group, i in zip(GROUPS.values(), words, strict=True))
    return f"{texture} {colour} {shape} on {ground}"


def combinations(held_out: bool = False) -> Tensor:
    """Combinations of words [K, 4]: the tenth that the teacher never saw, or the others."""
    table = torch.cartesian_prod(*(torch.arange(len(group)) for group in GROUPS.values()))
    unseen = (torch.arange(len(table)) * 7) % 10 == 0
    return table[unseen if held_out else ~unseen]


def tokenize(texts: Sequence[str]) -> Tensor:
    """Token numbers [B, TOKENS]: 0 fills up, word i of `WORDS` is i + 1.

    Words may be left out, also all of them. Raises ValueError for a word it does not know, and for too many.
    """
    rows = torch.zeros(len(texts), TOKENS, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        words = [word for word in text.lower().replace(",", " ").split() if word not in SILENT]
        unknown = [word for word in words if word not in WORDS]
        if unknown:
            raise ValueError(f"the scenes model knows the words {', '.join(WORDS)}; not {unknown[0]!r:.40}")
        if len(words) > TOKENS:
            raise ValueError(
                f"a prompt of the scenes model has at most {TOKENS} words; this one has {len(words)}: {text!r:.80}"
            )
        for place, word in enumerate(words):
            row[place] = WORDS.index(word) + 1
    return rows


def labels(texts: Sequence[str]) -> dict[str, Tensor]:
    """The class [N] that each prompt asks for, by word group; groups that some prompt has no word of are left out."""
    asked = [{WORDS[token - 1] for token in row if token} for row in tokenize(texts).tolist()]
    found = {}
    for group, words in GROUPS.items():
        classes = [[index for index, word in enumerate(words) if word in row] for row in asked]
        if all(len(of_one) == 1 for of_one in classes):
            found[group] = torch.tensor(classes)[:, 0]
    return found


class TextEncoder(nn.Module):
    """Words to conditionings: an embedding, one layer of self-attention, and their mean as the pooled vector.

    Token numbers [B, TOKENS] -> context [B, TOKENS, TEXT_WIDTH], pooled [B, TEXT_WIDTH].
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, TEXT_WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(TOKENS, TEXT_WIDTH))
        self.layer = nn.TransformerEncoderLayer(TEXT_WIDTH, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.pool = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        context = self.layer(self.words(tokens) + self.places)
        return context, self.pool(context.mean(1))


TEXT, INPAINTING, EDITING = "text", "inpainting", "editing"
MODELS = {TEXT: "transformer.safetensors", INPAINTING: "inpainting.safetensors", EDITING: "editing.safetensors"}
CHANNELS = {TEXT: 16, INPAINTING: 33, EDITING: 32}  # that go in: the latent's, and those of what a model is told


def new_classifier(space: str) -> FeatureClassifier:
    """The evaluator of a feature space, ``"latent"`` (16 channels, 8 x 8) or ``"pixel"`` (64 px); its classes are all
    words, group after group."""
    if space == "latent":
        return FeatureClassifier(LATENT_SHAPE[0], 64, 1, len(WORDS), dropout=0.2)
    return FeatureClassifier(3, 16, 3, len(WORDS), dropout=0.2)


def by_group(logits: Tensor) -> dict[str, Tensor]:
    """The logits [B, len(WORDS)] of each group of words."""
    return dict(zip(GROUPS, logits.split([len(g) for g in GROUPS.values()], dim=1), strict=True))


def load_classifier(space: str) -> tuple[FeatureClassifier, dict[str, Tensor]]:
    """The shipped evaluator and its reference statistics (``mean`` [64], ``cov`` [64, 64] of real held-out scenes)."""
    return shipped.load_classifier(new_classifier(space), ASSETS, space)


def new_transformer(kind: str = TEXT) -> Any:
    """A fresh network of one of `MODELS`, diffusers' ``SD3Transformer2DModel``."""
    return shipped.new_transformer({**TRANSFORMER_CONFIG, "in_channels": CHANNELS[kind]})


def load_transformer(kind: str = TEXT) -> Any:
    """One of `MODELS` as diffusers' ``SD3Transformer2DModel`` in float32, frozen, in eval mode."""
    return shipped.load_transformer(new_transformer(kind), ASSETS / MODELS[kind])


@cache
def load_text_encoder() -> TextEncoder:
    """The frozen text encoder in float32."""
    net = TextEncoder()
    net.load_state_dict({k: v.float() for k, v in load_file(ASSETS / "text_encoder.safetensors").items()})
    return net.eval().requires_grad_(False)


@torch.no_grad()
def encode_text(texts: Sequence[str]) -> Cond:
    """Conditionings of prompts, one row each; an empty text is the empty conditioning. Raises as `tokenize`."""
    return Cond(*load_text_encoder()(tokenize(texts)))


def load_autoencoder() -> Any:
    """The autoencoder as diffusers' ``AutoencoderTiny`` with the padding channels cut off."""
    return shipped.load_autoencoder(ASSETS, AUTOENCODER_WIDTH)


def training_log() -> dict:
    """How the shipped files were made: seed, iterations, losses and evaluator figures."""
    return shipped.training_log(ASSETS)


def scenes_backend(gradient_checkpointing: bool = False, kind: str = TEXT) -> DiffusersBackend:
    """One of `MODELS` as a backend (flow, no shift)."""
    return shipped.backend_of(load_transformer(kind), gradient_checkpointing)
