"""The noises of an evaluation: streams of their own, which no dataset and no training draws from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..diffusion.samplers import Model, sample_many

EVALUATION = "evaluation"  # what is scored: the same noises for every model
REFERENCE = "evaluation: reference"  # what it is compared with, where that is the teacher


def evaluation_samples(
    model: Model,
    sigmas: Tensor,
    conds,
    shape: Sequence[int],
    *,
    seed: int = 0,
    count: int,
    purpose: str = EVALUATION,
    **options,
) -> Tensor:
    """`sample_many` with the noises, initial and injected, of a named stream (`noise.ItemNoise`)."""
    return sample_many(model, sigmas, conds, shape, seed=seed, count=count, purpose=purpose, **options)
