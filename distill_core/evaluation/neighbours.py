"""Density and coverage (Naeem et al. 2020, section 3): do samples lie where the reference does, and do they reach all
of it?"""

from __future__ import annotations

import torch
from torch import Tensor

from .intervals import Bootstrap, Figure

NEIGHBOURS = 5
MOST = 2000  # items of samples and reference that are compared: the distances of all pairs are needed


def neighbour_figures(features: Tensor, examples: Tensor, bootstrap: Bootstrap) -> dict[str, Figure]:
    """density and coverage of features [N, D] with respect to the reference's ``examples`` [M, D], with k = 5.

    A ball lies around every example, as far as its k-th nearest other example.  density: how many balls a sample lies
    in, / k; about 1 for samples like the reference, larger where they crowd into its middle.  coverage: share of balls
    with a sample in them, in [0, 1]; with N = M it is about 1 - 2^-k = 0.97 for samples like the reference.

    A resample of coverage takes a sample with its multiplicity, so it reaches fewer balls than the set; the interval
    has this shift taken out (`Figure.interval`) and is somewhat too wide.
    """
    features, examples = features.double(), examples.double()
    k = min(NEIGHBOURS, len(examples) - 1)
    radii = torch.cdist(examples, examples).kthvalue(k + 1, dim=1).values  # the nearest is the example itself
    inside = torch.cdist(features, examples) <= radii  # [N, M]
    held = inside.float()
    coverage = (bootstrap.counts @ held > 0).float().mean(1)
    return {
        "density": bootstrap.of_mean(held.sum(1) / k),
        "coverage": Figure(inside.any(0).float().mean().item(), coverage),
    }
