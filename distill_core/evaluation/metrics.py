"""Quality of samples in the feature spaces of networks that the student was not trained with (`trained_on` tells)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..methods.components import EFFICIENTNET
from ..models import mini
from ..models.vision import image_network


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) between two Gaussians (Heusel et al. 2017, eq. 6).

    Means [D], covariances [D, D]; computed in float64. The root's trace comes from the eigenvalues of the symmetric
    A^(1/2) B A^(1/2), so it is real even when sampling noise makes A B slightly indefinite.
    """
    mean_a, cov_a, mean_b, cov_b = (t.double() for t in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.no_grad()
def features_and_accuracy(
    net: mini.FeatureClassifier, x: Tensor, labels: Tensor, size: int = 250
) -> tuple[Tensor, float]:
    """Features [N, D] of an evaluator and how often it names the class that was asked for, in [0, 1]."""
    features = torch.cat([net.features(x[i : i + size]) for i in range(0, len(x), size)])
    predicted = net.head(torch.relu(features)).argmax(1)
    return features, (predicted == labels).float().mean().item()


class MiniEvaluator:
    """Fréchet distance and class accuracy of mini-model latents, on the latents and on the decoded pixels.

    The references are the 10,000 real test images. ``__call__(latents [N, 16, 8, 8], labels [N])`` gives fd, accuracy,
    fd_pixels, accuracy_pixels (unless ``pixels`` is False, since decoding is the slow part) and diversity, the mean
    within-class standard deviation of the latent features.
    """

    def __init__(self) -> None:
        self.evaluators = {space: mini.load_classifier(space) for space in ("latent", "pixel")}
        self.decoder = mini.load_autoencoder().decoder

    @torch.no_grad()
    def decode(self, latents: Tensor, size: int = 100) -> Tensor:
        """Latents -> images [N, 3, 64, 64] in [-1, 1]."""
        parts = (latents[i : i + size] for i in range(0, len(latents), size))
        return torch.cat([self.decoder(p.contiguous(memory_format=torch.channels_last)).clamp(-1, 1) for p in parts])

    def __call__(self, latents: Tensor, labels: Tensor, pixels: bool = True) -> dict[str, float]:
        result, spaces = {}, [("latent", latents, "")]
        if pixels:
            spaces.append(("pixel", self.decode(latents), "_pixels"))
        for space, x, suffix in spaces:
            net, reference = self.evaluators[space]
            features, accuracy = features_and_accuracy(net, mini.classifier_input(space, x), labels)
            mean, cov = features.double().mean(0), features.double().T.cov()
            result[f"fd{suffix}"] = frechet_distance(mean, cov, reference["mean"], reference["cov"])
            result[f"accuracy{suffix}"] = accuracy
            if space == "latent":
                spread = [features[labels == c].std(0).mean() for c in labels.unique()]
                result["diversity"] = torch.stack(spread).mean().item()
        return {name: round(value, 4) for name, value in result.items()}


def fd_between(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between two sets of features [N, D]."""
    moments = ((f.double().mean(0), f.double().T.cov()) for f in (features_a, features_b))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    return frechet_distance(mean_a, cov_a, mean_b, cov_b)


def trained_on(description: dict) -> bool:
    """Whether the network of `ImageFeatures` was the student's discriminator, by its file's description (`read_lora`).

    Not told: a perceptual distance that was itself fitted to that network's (`perceptual train --pixel efficientnet`).
    """
    vision = description.get("config", {}).get("vision")  # only a method that reads this section has it in its file
    return isinstance(vision, dict) and vision.get("network") == EFFICIENTNET


class Source(Protocol):
    """Who decodes latents [B, C, H, W] to images [B, 3, h, w] in [-1, 1]: the sources of `models.pipelines`."""

    def decode(self, latents: Tensor) -> Tensor: ...


class ImageFeatures:
    """Pooled features [N, 1280] of an ImageNet network (EfficientNet-lite0), with latents that ``source`` decodes.

    ADD can have the same network as its discriminator's eyes; a score of such a student flatters it, see `trained_on`.
    Raises ValueError when `image_network` does.
    """

    SIZE = 224

    def __init__(self, source: Source) -> None:
        self.net = image_network()
        self.source = source

    @torch.no_grad()
    def __call__(self, latents: Tensor, size: int = 25) -> Tensor:
        parts = []
        for part in latents.split(size):
            images = self.source.decode(part).float().cpu()
            images = torch.nn.functional.interpolate(
                images, size=(self.SIZE, self.SIZE), mode="bilinear", antialias=True
            )
            parts.append(self.net.extract_features(images).mean((2, 3)))
        return torch.cat(parts)
