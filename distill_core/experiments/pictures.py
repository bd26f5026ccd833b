"""A picture of what `compare` has trained: the same prompts and noises, the teacher above, entries below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..evaluation.plots import sample_grid
from .grounds import Ground
from .results import read_shown, result_path

COLUMNS = 10


def draw_samples(ground: Ground, out: Path, seed: int, names: Sequence[str], path: Path) -> None:
    """One row for the teacher and each entry at each number of steps, as PNG; prompts spread over all of the ground's.

    Raises ValueError when a result is not there or has no samples.
    """
    chosen = torch.linspace(0, len(ground.conds) - 1, min(COLUMNS, len(ground.conds))).long()
    rows = [
        (f"{name}, {steps} step{'s' * (steps != '1')}", latents[chosen])
        for name in ("teacher", *names)
        for steps, latents in read_shown(result_path(out, name, None if name == "teacher" else seed)).items()
    ]
    decode = ground.evaluator(rows[0][1]).decode
    sample_grid(
        [(label, decode(latents)) for label, latents in rows],
        [ground.captions[row].replace(" ", "\n") for row in chosen.tolist()],
        path,
    )
