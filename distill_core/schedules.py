"""Few-step sigma grids and the densities that training draws noise levels from.

A grid is a 1-D float32 CPU tensor, falling, ending in 0 (k-diffusion's and ComfyUI's SIGMAS). A flow shift has two
units in the wild, and they must never be confused: ``shift_alpha`` is the factor a in a s / (1 + (a - 1) s) (SD3,
Wan, Z-Image), ``shift_mu`` is its logarithm (FLUX, Qwen).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import ItemNoise
from .process import DiscreteProcess


def check_steps(steps: int, most: int | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        raise ValueError(f"steps must be between 1 and {most or 'any number'}, not {steps}")


def explicit_sigmas(levels: Sequence[float]) -> Tensor:
    """The given noise levels with a closing 0. Raises ValueError unless they are finite, positive and falling."""
    levels = [float(s) for s in levels]
    if levels and levels[-1] == 0.0:
        levels = levels[:-1]
    if not levels:
        raise ValueError("a sigma list needs at least one noise level above 0")
    ordered = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not ordered or levels[-1] <= 0 or not all(map(math.isfinite, levels)):
        raise ValueError(f"sigmas must be finite, above 0 and falling: {levels}")
    return torch.tensor([*levels, 0.0])


def shift_sigmas(sigmas: Tensor, *, shift_alpha: float | None = None, shift_mu: float | None = None) -> Tensor:
    """Time shift of flow sigmas, a s / (1 + (a - 1) s), with a = ``shift_alpha`` or exp(``shift_mu``) (SD3, eq. 23)."""
    if (shift_alpha is None) == (shift_mu is None):
        raise ValueError("give either shift_alpha (a factor) or shift_mu (its logarithm), not both")
    alpha = math.exp(shift_mu) if shift_alpha is None else shift_alpha
    if alpha <= 0:
        raise ValueError(f"a shift factor must be positive, not {alpha}")
    return alpha * sigmas / (1 + (alpha - 1) * sigmas)


def shifted_sigmas(steps: int, *, shift_alpha: float | None = None, shift_mu: float | None = None) -> Tensor:
    """Evenly spaced flow times 1 .. 0, shifted. ``shift_alpha=1`` is FLUX.1 schnell's list, 3 is SD3.5 Turbo's."""
    check_steps(steps)
    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift_alpha=shift_alpha, shift_mu=shift_mu)


def trailing_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """Evenly spaced from the last timestep: 4 of 1000 -> 999, 749, 499, 249 (Lin et al. 2023, "trailing")."""
    check_steps(steps, train_steps)
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


def turbo_timesteps(steps: int) -> list[int]:
    """999, 899, 799, ...: the first ``steps`` of ten (Stability's SD-Turbo demo, ComfyUI's SDTurboScheduler)."""
    check_steps(steps, 10)
    return [999 - 100 * i for i in range(steps)]


def sigmas_at_timesteps(process: DiscreteProcess, timesteps: Sequence[int]) -> Tensor:
    """The grid through the given timesteps of a discrete model."""
    return explicit_sigmas(process.sigma(torch.tensor(timesteps)).tolist())


def grid_sigmas(process, steps: int) -> Tensor:
    """The default few-step grid of a process: shifted for flow models, trailing for discrete ones."""
    if isinstance(process, DiscreteProcess):
        return sigmas_at_timesteps(process, trailing_timesteps(steps, len(process.sigmas)))
    return shifted_sigmas(steps, shift_alpha=process.shift_alpha)


def logit_normal(random: ItemNoise, mean: float, std: float) -> Tensor:
    """Flow times sigmoid(N(mean, std^2)), [B] in (0, 1): LADD's pi(t; m, s), SD3's training density (SD3, eq. 19)."""
    return torch.sigmoid(mean + std * random.normal())


def draw_from_grid(random: ItemNoise, levels: Tensor, probabilities: Sequence[float]) -> Tensor:
    """One of ``levels`` [K] per item with the given probabilities [K] -> [B].

    Raises ValueError when the counts differ or the probabilities are negative or sum to 0.
    """
    weights = torch.tensor(probabilities, dtype=torch.float64)
    if len(weights) != len(levels) or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"{len(levels)} noise levels need as many probabilities >= 0, got {list(probabilities)}")
    edges = (weights / weights.sum()).cumsum(0)
    edges[-1] = 1.0
    return levels[torch.searchsorted(edges, random.uniform().double(), right=True)]
