"""The Fréchet distance between features of samples and of a reference (Heusel et al. 2017), with its interval.

It has a bias: of N items it is too large by about a constant / N, since noise in means and covariances adds to a
squared distance (Chong and Forsyth 2020). So figures of different counts cannot be compared. Of equal counts the biases
are nearly equal, and they cancel in a difference. A finite reference adds a bias of its own, the same for everybody.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import Bootstrap, Figure


class Gaussian(NamedTuple):
    """mean [D] and cov [D, D] of a set of features."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """The moments of features [N, D], in float64; the covariance divides by N - 1."""
        return cls(features.double().mean(0), torch.atleast_2d(features.double().T.cov()))


def square_root(cov: Tensor) -> Tensor:
    """The symmetric root of a covariance [D, D]; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(cov.double())
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) between two Gaussians (Heusel et al. 2017, eq. 6).

    Means [D], covariances [D, D]; computed in float64. The root's trace comes from the eigenvalues of the symmetric
    A^(1/2) B A^(1/2), so it is real even when sampling noise makes A B slightly indefinite.
    """
    return _distance(Gaussian(mean_b.double(), cov_b.double()), Gaussian(mean_a, cov_a), square_root(cov_a))


def _distance(of: Gaussian, reference: Gaussian, root: Tensor) -> float:
    """`frechet_distance` with the root of the reference's covariance at hand."""
    cross = torch.linalg.eigvalsh(root @ of.cov @ root).clamp(min=0).sqrt().sum()
    apart = (of.mean - reference.mean.double()).square().sum()
    return (apart + of.cov.trace() + reference.cov.double().trace() - 2 * cross).item()


def fd_between(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between two sets of features [N, D]."""
    return frechet_distance(*Gaussian.of(features_a), *Gaussian.of(features_b))


def frechet_figure(features: Tensor, reference: Gaussian, bootstrap: Bootstrap) -> Figure:
    """fd of features [N, D] to the reference. A resample costs N D^2 for its weighted moments and D^3 for the root."""
    features, root = features.double(), square_root(reference.cov)
    centre = features.mean(0)
    features = features - centre  # the second moments below lose no digits

    def distance(weights: Tensor) -> float:
        weighted = features * weights.double()[:, None]
        mean = weighted.sum(0) / len(features)
        cov = (weighted.T @ features - len(features) * mean.outer(mean)) / (len(features) - 1)
        return _distance(Gaussian(centre + mean, cov), reference, root)

    return bootstrap.each(distance)
