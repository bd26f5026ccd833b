"""A student's items beside the teacher's own from the same noises and prompts, one to one."""

from __future__ import annotations

import torch
from torch import Tensor

from .detail import BANDS, FINE, cross_energies, grey
from .intervals import Bootstrap, Figure

LATENT_COLUMNS, IMAGE_COLUMNS = 3, 3 + 3 * BANDS


def distance_columns(x: Tensor, own: Tensor) -> Tensor:
    """Mean squared distance to ``own``, and its mean and mean square, for each item: [B, 3]."""
    x, own = x.flatten(1).double(), own.flatten(1).double()
    return torch.stack([(x - own).square().mean(1), own.mean(1), own.square().mean(1)], 1).cpu()


def image_columns(images: Tensor, own: Tensor) -> Tensor:
    """`distance_columns` of the images, then the cross-spectrum, the power and the teacher's power in each ring."""
    a, b = grey(images), grey(own)
    spectra = [cross_energies(a, b), cross_energies(a, a), cross_energies(b, b)]
    return torch.cat([distance_columns(images, own), *(s.double().cpu() for s in spectra)], 1)


def relative_distance(means: Tensor) -> Tensor:
    """Root mean squared distance, relative to the standard deviation of the teacher's own: [..., 3] -> [...]."""
    return (means[..., 0] / (means[..., 2] - means[..., 1].square())).sqrt()


def own_figures(latents: Tensor, images: Tensor, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Figures of the columns of latents [N, 3] and images [N, 3 + 3 BANDS].

    drift, drift_pixels: `relative_distance` of latents and images; 0 is the teacher's own picture, 1.41 another one.
    coherence: correlation of the two pictures' detail above half of Nyquist, in [-1, 1] (the real part of the complex
    coherence, Bendat and Piersol 2010, with the sums over items and frequencies).
    detail_ratio: energy above half of Nyquist, student's / teacher's.  detail_error: |log| of it.
    """
    distance = lambda m: relative_distance(m[..., :3])  # noqa: E731

    def fine(means: Tensor, which: int) -> Tensor:
        start = 3 + which * BANDS
        return means[..., start : start + BANDS][..., FINE].sum(-1)

    return {
        "drift": bootstrap.of_means(latents, distance),
        "drift_pixels": bootstrap.of_means(images, distance),
        "coherence": bootstrap.of_means(images, lambda m: fine(m, 0) / (fine(m, 1) * fine(m, 2)).sqrt()),
        "detail_ratio": bootstrap.of_means(images, lambda m: fine(m, 1) / fine(m, 2)),
        "detail_error": bootstrap.of_means(images, lambda m: (fine(m, 1) / fine(m, 2)).log().abs()),
    }
