"""Feature spaces in which samples are compared with a reference: networks that no student was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..methods.components import EFFICIENTNET
from ..models import mini, scenes
from ..models.pipelines import MiniSource, PipelineSource, ScenesSource
from ..models.vision import image_network
from .frechet import Gaussian

SIZE = 224  # of the images that the ImageNet network sees
DIRECTIONS = 64  # of the ImageNet features that are kept


@dataclass(frozen=True)
class Space:
    """Features of samples, and what they are compared with.

    suffix: of the figures' names.  features: (latents [B, C, H, W], images [B, 3, h, w] in [-1, 1]) -> [B, D].
    reference: the moments of the reference's features.  heads: of each word group that the network knows, features ->
    class logits; the group's name is "" where there is one.
    examples: features [M, D] of reference items, for density and coverage; None without them.
    """

    suffix: str
    features: Callable[[Tensor, Tensor], Tensor]
    reference: Gaussian
    heads: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    examples: Tensor | None = None


def mini_space(space: str) -> Space:
    """The shipped classifier on the mini model's latents ("latent") or images ("pixel"), 64 features.

    The reference is the 10,000 real test images.
    """
    net, reference = mini.load_classifier(space)

    def features(latents: Tensor, images: Tensor) -> Tensor:
        return net.features(mini.classifier_input(space, latents if space == "latent" else images))

    return Space(
        "" if space == "latent" else "_pixels",
        features,
        Gaussian(reference["mean"], reference["cov"]),
        {"": lambda x: net.head(torch.relu(x))},
    )


def scenes_space(space: str) -> Space:
    """The scenes model's classifier on latents ("latent") or images ("pixel"), 64 features, a head for each word group.

    The reference is real scenes of every combination of words, drawn from other numbers than the training pictures.
    """
    net, reference = scenes.load_classifier(space)

    def head(group: str) -> Callable[[Tensor], Tensor]:
        return lambda x: scenes.by_group(net.head(torch.relu(x)))[group]

    return Space(
        "" if space == "latent" else "_pixels",
        lambda latents, images: net.features(latents if space == "latent" else images),
        Gaussian(reference["mean"].double(), reference["cov"].double()),
        {group: head(group) for group in scenes.GROUPS},
    )


def shipped_spaces(source: MiniSource | PipelineSource) -> list[Space]:
    """Those of a shipped model, on latents and on images; none for another."""
    if not isinstance(source, MiniSource):
        return []
    make = scenes_space if isinstance(source, ScenesSource) else mini_space
    return [make("latent"), make("pixel")]


@lru_cache(maxsize=1)
def _imagenet_network() -> Any:
    return image_network()


def imagenet_features(images: Tensor) -> Tensor:
    """Pooled features [B, 1280] of EfficientNet-lite0 for images [B, 3, h, w] in [-1, 1].

    Raises ValueError when `image_network` does.
    """
    network = _imagenet_network()
    resized = torch.nn.functional.interpolate(images.float().cpu(), size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return torch.cat([network.extract_features(part).mean((2, 3)) for part in resized.split(25)])


def imagenet_space(examples: Tensor) -> Space:
    """ImageNet features with the reference's own as examples [M, 1280].

    1280 x 1280 covariances would take tens of thousands of items, and their distance be mostly bias. So the features
    are projected on the `DIRECTIONS` principal directions of the reference (a quarter of M, if that is fewer); the
    figures are comparable only for the same reference.
    """
    centre = examples.double().mean(0)
    _, _, directions = torch.linalg.svd(examples.double() - centre, full_matrices=False)
    basis = directions[: max(1, min(DIRECTIONS, len(examples) // 4))].T

    def project(features: Tensor) -> Tensor:
        return (features.double() - centre) @ basis

    projected = project(examples)
    return Space(
        "_imagenet",
        lambda latents, images: project(imagenet_features(images)),
        Gaussian.of(projected),
        examples=projected,
    )


def trained_on(description: dict) -> bool:
    """Whether the ImageNet network was the student's discriminator, by its file's description (`read_lora`).

    Not told: a perceptual distance that was itself fitted to that network's (`perceptual train --pixel efficientnet`).
    """
    vision = description.get("config", {}).get("vision")  # only a method that reads this section has it in its file
    return isinstance(vision, dict) and vision.get("network") == EFFICIENTNET
