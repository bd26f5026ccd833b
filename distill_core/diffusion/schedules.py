"""Few-step sigma grids and the densities that training draws noise levels from.

A grid is a 1-D float32 CPU tensor, falling, ending in 0 (k-diffusion's and ComfyUI's SIGMAS). A flow shift has two
units in the wild, and they must never be confused: ``shift_alpha`` is the factor a in a s / (1 + (a - 1) s) (SD3,
Wan, Z-Image), ``shift_mu`` is its logarithm (FLUX, Qwen).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import ItemNoise
from .process import DiscreteProcess, NoiseProcess, TimestepProcess

LEVEL_TOLERANCE = 1e-4  # relative; grids that are meant to be different differ by much more


def check_steps(steps: int, most: int | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        raise ValueError(f"steps must be between 1 and {most or 'any number'}, not {steps}")


def same_level(a: Any, b: Any) -> Any:
    """Whether noise levels ``a`` and ``b`` (numbers or tensors) are one, up to 1e-4 of ``b``: files round them."""
    return abs(a - b) <= LEVEL_TOLERANCE * b


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
    if shift_alpha is not None and shift_mu is None:
        alpha = shift_alpha
    elif shift_mu is not None and shift_alpha is None:
        alpha = math.exp(shift_mu)
    else:
        raise ValueError("give either shift_alpha (a factor) or shift_mu (its logarithm), not both")
    if alpha <= 0:
        raise ValueError(f"a shift factor must be positive, not {alpha}")
    return alpha * sigmas / (1 + (alpha - 1) * sigmas)


def size_shift(tokens: float, reference: float) -> float:
    """The factor a that shifts flow levels for latents of ``reference`` tokens to ones of ``tokens`` (SD3, eq. 23)."""
    return math.sqrt(tokens / reference)


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


def lcm_timesteps(steps: int, train_steps: int = 1000, distilled_steps: int = 50) -> list[int]:
    """Evenly chosen among the 50 timesteps that LCM and TCD were distilled on: 4 -> 999, 759, 499, 259 (diffusers'
    LCMScheduler and TCDScheduler)."""
    check_steps(steps, distilled_steps)
    stride = train_steps // distilled_steps
    return [train_steps - 1 - stride * (i * distilled_steps // steps) for i in range(steps)]


def sigmas_at_timesteps(process: TimestepProcess, timesteps: Sequence[int]) -> Tensor:
    """The grid through the given timesteps of a discrete model."""
    return explicit_sigmas(process.sigma(torch.tensor(timesteps)).tolist())


def grid_sigmas(process: NoiseProcess, steps: int) -> Tensor:
    """The default few-step grid of a process: shifted for flow models, trailing for discrete ones."""
    if isinstance(process, DiscreteProcess):
        return sigmas_at_timesteps(process, trailing_timesteps(steps, len(process.sigmas)))
    return shifted_sigmas(steps, shift_alpha=getattr(process, "shift_alpha", 1.0))


def with_levels(sigmas: Tensor, levels: Sequence[float]) -> Tensor:
    """A grid with each of ``levels`` in it; a level of the grid that is the same (`same_level`) gives way."""
    far = [s for s in sigmas[:-1].tolist() if not any(same_level(s, level) for level in levels)]
    return explicit_sigmas(sorted([*far, *levels], reverse=True))


def trigflow_sigmas(steps: int, last_angle: float = 1.3) -> Tensor:
    """SANA-Sprint's levels: angles pi/2, 0 or pi/2, 1.3, 0 or evenly spaced from pi/2 (diffusers' SCMScheduler), as
    flow times sin t / (sin t + cos t), the level of the same signal-to-noise ratio."""
    check_steps(steps)
    angles = torch.linspace(math.pi / 2, 0, steps + 1)
    if steps == 2:
        angles[1] = last_angle
    return explicit_sigmas((angles.sin() / (angles.sin() + angles.cos())).clamp(max=1.0).tolist())


def logit_normal(random: ItemNoise, mean: float, std: float) -> Tensor:
    """Flow times sigmoid(N(mean, std^2)), [B] in (0, 1): LADD's pi(t; m, s), SD3's training density (SD3, eq. 19)."""
    return torch.sigmoid(mean + std * random.normal())


def draw_whole_schedule(random: ItemNoise, process: NoiseProcess) -> Tensor:
    """A noise level per item from all that a process has, [B].

    Uniform in the timesteps of a table; for flow models logit-normal(0, 1) in flow time (SD3, section 3.1), shifted
    like the process' own grid.
    """
    if isinstance(process, DiscreteProcess):
        return process.sigma((random.uniform() * len(process.sigmas)).floor())
    return shift_sigmas(logit_normal(random, 0.0, 1.0), shift_alpha=getattr(process, "shift_alpha", 1.0))


def draw_evenly(random: ItemNoise, process: NoiseProcess, low: float, high: float) -> Tensor:
    """A noise level per item, uniform between two parts (0 to 1) of all timesteps that a process has, [B].

    Flow times are shifted like the process' own grid.
    """
    part = low + (high - low) * random.uniform()
    if isinstance(process, DiscreteProcess):
        return process.sigma((part * len(process.sigmas)).floor())
    return shift_sigmas(part, shift_alpha=getattr(process, "shift_alpha", 1.0))


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


def check_sigmas(sigmas: Tensor, closed: bool = True) -> Tensor:
    """The list as it came, if a sampler can walk it: 1-D, finite, falling, at least one level above a last 0.

    closed: whether the last level must be 0; the first of two samplers ends above it.
    Raises ValueError saying what is wrong with it.
    """
    if sigmas.ndim != 1:
        raise ValueError(f"SIGMAS must be one list of levels, not of shape {tuple(sigmas.shape)}")
    if len(sigmas) < 2:
        raise ValueError(
            f"SIGMAS holds {len(sigmas)} level{'s' * (len(sigmas) != 1)}; it needs at least one level and a closing 0"
        )
    levels = sigmas.tolist()
    for i, level in enumerate(levels):
        place = f"level {i + 1} of {len(levels)} is {level:.6g}"
        if not math.isfinite(level):
            raise ValueError(f"SIGMAS must be finite; {place}")
        if level < 0:
            raise ValueError(f"SIGMAS cannot be below 0; {place}")
        if i and level >= levels[i - 1]:
            raise ValueError(f"SIGMAS must fall from each level to the next; {place}, after {levels[i - 1]:.6g}")
    if closed and levels[-1] != 0:
        raise ValueError(f"SIGMAS must end in 0, not in {levels[-1]:g}; it would leave noise in the picture")
    return sigmas


def check_denoise(denoise: float) -> None:
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, not {denoise:g}; at 0 there is nothing to sample")


def snap_denoise(sigmas: Tensor, denoise: float, table: Tensor | None = None) -> Tensor:
    """The part of a trained grid that starts at ``denoise``: exactly there, and then only at trained levels.

    sigmas [N + 1]: a grid ending in 0.  denoise in (0, 1]: the share of the grid that is left, so k / N starts at the
    k-th last trained level and the start is continuous and rising in between.  table: the sigmas of a discrete model
    [T], whose grids are interpolated in timesteps; flow sigmas are interpolated as they are. A trained level less than
    half an interval below the start is left out. Returns round(N denoise) + 1 levels, at least 2.
    Raises ValueError unless denoise is in (0, 1] and the grid falls to 0.
    """
    check_sigmas(sigmas)
    check_denoise(denoise)
    left = (len(sigmas) - 1) * denoise  # intervals that remain, fractional: of 4 steps at 0.6, 2.4
    # How many trained levels stay: those at least half an interval below the start, which the level 2 intervals before
    # the end is not at 2.4. 1e-6 makes up for the rounding of `left`.
    trained = max(0, math.floor(left - 0.5 + 1e-6))
    return torch.cat([levels_at(sigmas, [left], table), sigmas[len(sigmas) - 1 - trained :]])


def respace_denoise(sigmas: Tensor, denoise: float, table: Tensor | None = None) -> Tensor:
    """As many steps as the grid has, spread over its part that starts at ``denoise``, in the grid's own spacing.

    The start is that of `snap_denoise`; levels between trained ones are interpolated. Arguments and errors as there.
    """
    check_sigmas(sigmas)
    check_denoise(denoise)
    left = [denoise * intervals for intervals in range(len(sigmas) - 1, 0, -1)]
    return torch.cat([levels_at(sigmas, left, table), sigmas[-1:]])


def level_denoise(sigmas: Tensor, denoise: float, table: Tensor | None = None) -> Tensor:
    """The part of a trained grid that starts where noise is the share ``denoise`` of the latent: at that flow time.

    So 1 - denoise is how much of the picture is kept, whatever the model and its grid: sigma on flow models, the sigma
    of the same signal-to-noise ratio on others. After the start come the trained levels that `snap_denoise` would keep.
    Above the grid's first level, the whole grid. Arguments and errors as there.
    """
    check_sigmas(sigmas)
    check_denoise(denoise)
    start = sigmas.new_tensor(denoise if table is None else denoise / max(1e-9, 1 - denoise))
    if start >= sigmas[0]:
        return sigmas
    scale, _ = (lambda s: s, lambda s: s) if table is None else timestep_scale(table)
    members, position = scale(sigmas.double()), scale(start.double())
    below = int((members > position).sum())  # index of the first member at or under the start
    part = (position - members[below]) / (members[below - 1] - members[below])
    trained = max(0, math.floor(len(sigmas) - 1 - below + part.item() - 0.5 + 1e-6))
    return torch.cat([start[None], sigmas[len(sigmas) - 1 - trained :]])


DENOISE_MODES = {"snap": snap_denoise, "respace": respace_denoise, "noise_level": level_denoise}


def levels_at(sigmas: Tensor, left: Sequence[float], table: Tensor | None) -> Tensor:
    """The levels with ``left`` intervals to go (fractional), linear between members in flow time or in timesteps."""
    scale, unscale = (lambda s: s, lambda s: s) if table is None else timestep_scale(table)
    members = scale(sigmas.double())  # [N + 1] on the scale that is interpolated; float64, as 1e-6 is compared below
    levels = []
    for intervals in left:
        nearest = round(intervals)
        if nearest > 0 and abs(intervals - nearest) < 1e-6:  # a trained level stays what it is, to the last bit
            levels.append(sigmas[-1 - nearest].double())
        else:
            above = -1 - math.ceil(intervals)  # index of the grid's next higher level, counted from its end
            weight = intervals - math.floor(intervals)
            levels.append(unscale(weight * members[above] + (1 - weight) * members[above + 1]))
    return torch.stack(levels).to(sigmas.dtype)


def intervals_left(sigmas: Tensor, level: float, table: Tensor | None = None) -> float:
    """How many intervals of a grid [N + 1] lie below ``level``, fractional: the inverse of `levels_at`."""
    scale = (lambda s: s) if table is None else timestep_scale(table)[0]
    members, wanted = scale(sigmas.double()), scale(torch.tensor([level], dtype=torch.float64))[0]
    above = int((members >= wanted).sum().clamp(1, len(sigmas) - 1)) - 1  # index of the next higher level
    share = ((wanted - members[above + 1]) / (members[above] - members[above + 1])).clamp(0, 1).item()
    return len(sigmas) - 2 - above + share


def timestep_scale(table: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Sigma -> fractional timestep + 1 and back: linear in log sigma in the table, linear in sigma below its first."""
    knots = torch.arange(1, len(table) + 1, dtype=torch.float64)
    table = table.double().cpu()
    log_table = table.log()

    def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        high = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
        weight = ((x - xs[high - 1]) / (xs[high] - xs[high - 1])).clamp(0, 1)
        return ys[high - 1] + weight * (ys[high] - ys[high - 1])

    def scale(sigma: Tensor) -> Tensor:
        inside = interpolate(sigma.clamp(min=table[0]).log(), log_table, knots)
        return torch.where(sigma < table[0], sigma / table[0], inside)

    def unscale(timestep: Tensor) -> Tensor:
        inside = interpolate(timestep, knots, log_table).exp()
        return torch.where(timestep < 1, timestep * table[0], inside)

    return scale, unscale
