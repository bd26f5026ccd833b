"""More difference between the images of one prompt, where a distilled model at cfg 1 makes them too alike.

Both aids touch the first step only, in which the composition is decided, and both cost nothing.
`tests/benchmarks/seed_variety.py` measures them; docs/sampling.md has the table.
"""

from __future__ import annotations

from torch import Tensor

# What strength 1 means: chosen on the mini student, seed 5000001 (docs/sampling.md).
PROMPT_NOISE, STRONGER_NOISE = 0.5, 0.1


def noised_prompt(embedding: Tensor, noise: Tensor, strength: float) -> Tensor:
    """An embedding [B, ...] with noise of the same shape mixed in, rescaled to its own mean and spread.

    The condition-annealed sampler CADS (Sadat et al. 2023, arXiv 2310.17347, eq. 2 and 3), with its rescaling in full
    and a schedule that is one step long. strength: 0 to 1, of `PROMPT_NOISE` times the embedding's spread.
    """
    spread, mean = _row_moments(embedding)
    mixed = embedding + strength * PROMPT_NOISE * spread * noise
    mixed_spread, mixed_mean = _row_moments(mixed)
    return (mixed - mixed_mean) / mixed_spread.clamp(min=1e-12) * spread + mean


def stronger_noise(x: Tensor, strength: float) -> Tensor:
    """Pure noise [B, ...], as the network sees it in the first step, up to a tenth stronger than it should be."""
    return (1 + strength * STRONGER_NOISE) * x


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.flatten(1)
    shape = (len(x),) + (1,) * (x.ndim - 1)
    return flat.std(1).reshape(shape), flat.mean(1).reshape(shape)


def check_strength(strength: float) -> None:
    """Raises ValueError unless it is from 0 to 1."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, not {strength:g}")
