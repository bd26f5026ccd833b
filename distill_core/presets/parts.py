"""Recognising a list of noise levels as a trained list or as a part of one.

Parts are what is left after denoise below 1 (from any level on, at trained levels or in the list's own spacing), the
first of two experts (it ends above 0), a pass, and the end of a longer list of the same rule, as schedulers make it.
A part may begin and end between trained levels; a trained level less than half an interval from such an end may be
left out, as `schedules.snap_denoise` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..diffusion.process import TimestepProcess
from ..diffusion.schedules import intervals_left, levels_at, same_level, timestep_scale
from .levels import end_of_rule
from .table import Preset

SAME = 0.02  # flow time; Qwen's own alpha 3.158 instead of Lightning's 3 is 0.013 away and makes no visible difference
LONGEST = 100  # steps of the longest list that a part is looked for in


@dataclass(frozen=True)
class Part:
    """levels: the trained levels that the list stands for, with the list's own ends.  name: what it is, in words.
    total: steps of the whole list, None where that does not matter."""

    levels: Tensor
    name: str
    total: int | None = None
    whole: bool = False


def flow_time(sigmas: Tensor, table: Tensor | None) -> Tensor:
    """Noise levels as flow times in [0, 1], where a difference means the same for every kind of model."""
    return sigmas.double() if table is None else sigmas.double() / (1 + sigmas.double())


def distance(a: Tensor, b: Tensor, table: Tensor | None) -> float:
    """The largest difference of two lists in flow time; inf if they are not equally long."""
    return (flow_time(a, table) - flow_time(b, table)).abs().max().item() if len(a) == len(b) else float("inf")


def starts_full(given: Tensor, trained: Tensor, table: Tensor | None) -> bool:
    """Whether a list starts at the trained one's first level or above, and not on the way to its second."""
    first, second = flow_time(trained[:2], table).tolist()
    return flow_time(given[:1], table).item() >= first - min(SAME, (first - second) / 4)


def starts_above(given: Tensor, trained: Tensor, table: Tensor | None) -> bool:
    """Whether a list starts in more noise than the trained one, which is then no part of it."""
    return (flow_time(given[:1], table) - flow_time(trained[:1], table)).item() > SAME


def lies_above(given: Tensor, trained: Tensor) -> bool:
    """Whether a list ends before the trained one begins."""
    return given[-1].item() >= trained[0].item()


def is_whole(given: Tensor, trained: Tensor, table: Tensor | None) -> bool:
    """Whether a list starts where the trained one does, or above, and ends in 0."""
    return given[-1].item() == 0 and starts_full(given, trained, table)


def find_part(given: Tensor, trained: Tensor, table: Tensor | None) -> Part | None:
    """``given`` [N + 1] as the list ``trained`` [M + 1] or a part of it, None if it is neither."""
    if is_whole(given, trained, table) and distance(given, trained, table) <= SAME:
        levels = torch.cat([torch.minimum(trained, given)[:1], trained[1:]])
        return Part(levels, "the trained list", len(trained) - 1, whole=True)
    if starts_above(given, trained, table):
        return None
    parts = [Part(levels, _name(given), len(trained) - 1) for levels in _between(given, trained, table)]
    parts += _spaced(given, trained, table)
    best = min(parts, key=lambda part: distance(given, part.levels, table))
    return best if distance(given, best.levels, table) <= SAME else None


def _spaced(given: Tensor, trained: Tensor, table: Tensor | None) -> Iterator[Part]:
    """What `schedules.respace_denoise` makes of the list from the start of ``given`` on, in any number of steps."""
    full, most = starts_full(given, trained, table), len(trained) - 1
    left = intervals_left(trained, given[0].item(), table)
    steps, closed = len(given) - 1, given[-1].item() == 0
    for total in [steps] if closed else range(steps + 1, len(trained)):
        if total == most or (total < most and not full):  # a whole list of fewer steps is none of its parts
            spaced = levels_at(trained, [left * i / total for i in range(total, 0, -1)], table)
            levels = _with_ends(given, torch.cat([spaced, torch.zeros(1)])[: len(given)])
            yield Part(levels, f"{_name(given)}, spaced like the trained list", len(trained) - 1)


def find_end_of_rule(
    given: Tensor, row: Preset, trained: Tensor, process: TimestepProcess | None, tokens: int, table: Tensor | None
) -> Part | None:
    """``given`` as the end of a longer list of the row's rule, or as the beginning of such an end."""
    if starts_above(given, trained, table):
        return None
    if starts_full(given, trained, table) and row.grid.get("rule") != "turbo":
        return None
    steps, closed = len(given) - 1, given[-1].item() == 0
    for total in [steps] if closed else range(steps + 1, LONGEST):
        levels = end_of_rule(row, given[0].item(), total, process, tokens)
        if levels is None:
            return None
        levels = levels[: len(given)]
        if distance(given, levels, table) <= SAME:
            return Part(_with_ends(given, levels), f"{_name(given)}, of a longer list of the same rule")
    return None


def nearest_part(given: Tensor, trained: Tensor, table: Tensor | None) -> Tensor:
    """The trained levels between the ends of ``given``, and these ends: a list never starts higher or ends lower.

    A list that starts above the trained one's first level gets that level instead; one that lies above it altogether
    stays what it is.
    """
    if lies_above(given, trained):
        return given
    if is_whole(given, trained, table):
        return torch.cat([torch.minimum(trained[:1], given[:1]), trained[1:]])
    if given[0] > trained[0]:
        given = torch.cat([trained[:1].to(given), given[1:]])
    return list(_between(given, trained, table))[-1]


def _between(given: Tensor, trained: Tensor, table: Tensor | None) -> Iterator[Tensor]:
    """Lists with the ends of ``given`` and the trained levels between them: with all, and without those that a start
    or an end may leave out, fewest last."""
    scale = (lambda s: s) if table is None else timestep_scale(table)[0]
    places = scale(trained.double()).tolist()
    first, last = scale(given[[0, -1]].double()).tolist()
    ends = given[[0, -1]].tolist()
    inner = [i for i, place in enumerate(places) if last < place < first]
    inner = [i for i in inner if not any(same_level(trained[i].item(), end) for end in ends)]
    if not inner:
        yield given[[0, -1]]
        return
    gaps = [a - b for a, b in pairwise(places)]  # below each level
    top, bottom = inner[0], inner[-1]
    half = 0.5 + 0.1  # of the gap between trained levels, with a tenth for lists that are a little off
    near_start = first - places[top] <= half * gaps[max(0, top - 1)]
    near_end = given[-1].item() > 0 and places[bottom] - last <= half * gaps[bottom]
    for cut_start in range(near_start + 1):
        for cut_end in range(near_end + 1):
            kept = inner[cut_start : len(inner) - cut_end]
            yield torch.cat([given[:1], trained[kept], given[-1:]])


def _with_ends(given: Tensor, levels: Tensor) -> Tensor:
    return torch.cat([given[:1], levels[1:-1].to(given), given[-1:]])


def _name(given: Tensor) -> str:
    if given[-1] == 0:
        return f"the last part of the trained list, from {given[0]:.4g} on"
    return f"the part of the trained list from {given[0]:.4g} to {given[-1]:.4g}"
