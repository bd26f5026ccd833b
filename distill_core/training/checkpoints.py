"""What a run goes on from: ``checkpoint.safetensors``, or a file for each process where the weights are shared out.

Each process then writes its own part, ``checkpoint_000250_1of2.safetensors``, without a word to the others. A run goes
on from the last step of which all parts are there. Those of the step before stay until then: since every step needs all
processes, a process that writes one knows that the one before is complete.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..changes import changes_between
from ..files import check_finite, load_tensors, parse_object, save_tensors
from .changes import OtherSettings
from .loop_config import MOST_STEPS
from .optimizers import load_optimizer_state, optimizer_state

if TYPE_CHECKING:
    from .loop import Run

CHECKPOINT_FORMAT = 2  # 1: version 0.1, whose random draws were others
WHOLE = "checkpoint.safetensors"
PART = re.compile(r"checkpoint_(\d+)_(\d+)of(\d+)\.safetensors")  # step, process from 1 on, processes


def save(run: Run) -> None:
    """Write the checkpoint: trained weights, average, optimisers, position and settings."""
    path = run.checkpoint
    if path is None:
        return
    tensors, optimizers = {f"ema.{name}": value for name, value in run.ema.items()}, {}
    for player in run.players:
        tensors |= {f"buffer.{player.name}.{name}": value for name, value in player.buffers.items()}
        tensors |= {f"{player.name}.{name}": value for name, value in player.parameters.items()}
        bad = [name for name, value in player.parameters.items() if not torch.isfinite(value).all()]
        if bad and run.parts:  # the other processes learn it by the next step's gradient, and end with this one
            return
        if bad:
            raise FloatingPointError(
                f"{player.name} weights are not finite after step {run.step} ({bad[0]}); they are not saved"
            )
        moments, rest = optimizer_state(run.optimizers[player.name], player.parameters)
        tensors |= {f"optimizer.{player.name}.{path}": value for path, value in moments.items()}
        optimizers[player.name] = rest
    state = {"format": CHECKPOINT_FORMAT, "step": run.step, "settings": run.settings(), "optimizers": optimizers}
    save_tensors(path, tensors, {"run": json.dumps(state)})
    if run.parts:
        forget_older(path)


def resume(run: Run) -> bool:
    """Go on from the checkpoint if there is one. Raises ValueError for one that is damaged or of another run."""
    path = path_to_read(run)
    if path is None:
        return False
    tensors, metadata = load_tensors(path)
    if "run" not in metadata:
        raise ValueError(f"{path} is not a training checkpoint of this project")
    restart = "restore a copy, or delete it to start the run again"
    state = parse_object(metadata["run"], f"{path}: its entry run", restart)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} was written by another version of Turbo Distill, whose random draws differ. "
            "Its run cannot go on: choose another output folder or run name, or delete it to start again"
        )
    changes = changes_between(run.settings(), state.get("settings"))
    if changes:
        cure = "choose another output folder, or delete the checkpoint to start again"
        raise OtherSettings(str(path), changes, cure)
    step = state.get("step")
    if not isinstance(step, int) or not 0 < step <= MOST_STEPS:
        raise ValueError(f"{path} is damaged: its step is {step!r:.40}; {restart}")
    check_finite(tensors, path, restart)
    try:
        _load(run, tensors, state.get("optimizers", {}))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {restart}") from error
    run.step = step
    return True


def _load(run: Run, tensors: dict[str, Tensor], optimizers: dict[str, dict]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    copy_into(run.ema, part("ema."))
    for player in run.players:
        copy_into(player.buffers, part(f"buffer.{player.name}."))
        copy_into(player.parameters, part(f"{player.name}."))
        moments, rest = part(f"optimizer.{player.name}."), optimizers.get(player.name, {})
        load_optimizer_state(run.optimizers[player.name], player.parameters, moments, rest)


def path_to_write(run: Run) -> Path | None:
    """The file that this process writes now, None for none."""
    if run.folder is None or not (run.parts or run.is_main):
        return None
    if run.parts:
        return run.folder / part_name(run.step, run.parts.rank + 1, run.parts.world)
    return run.folder / WHOLE


def path_to_read(run: Run) -> Path | None:
    """The file that this process goes on from, None where there is none.

    Raises ValueError for parts of another number of processes.
    """
    if run.folder is None:
        return None
    sets, whole = complete_sets(run.folder), run.folder / WHOLE
    if not sets or (whole.exists() and not run.parts):
        return whole if whole.exists() else None
    step, world = max(sets)
    if run.parts is None:  # `resume` refuses it, as a run with other settings
        return run.folder / part_name(step, 1, world)
    if world != run.parts.world:
        raise ValueError(
            f"{run.folder} holds the checkpoint of a run whose weights are shared out among {world} processes, and "
            f"these are {run.parts.world}: start it with {world}, or choose another output folder"
        )
    return run.folder / part_name(step, run.parts.rank + 1, world)


def part_name(step: int, process: int, processes: int) -> str:
    return f"checkpoint_{step:06}_{process}of{processes}.safetensors"


def complete_sets(folder: Path) -> set[tuple[int, int]]:
    """(step, processes) of which all parts are in a folder."""
    found: dict[tuple[int, int], int] = defaultdict(int)
    for path in folder.glob("checkpoint_*.safetensors"):
        if match := PART.fullmatch(path.name):
            found[int(match[1]), int(match[3])] += 1
    return {(step, processes) for (step, processes), count in found.items() if count == processes}


def forget_older(written: Path) -> None:
    """Remove this process's parts but the one that was written and that of the step before."""
    match = PART.fullmatch(written.name)
    assert match
    mine = {}
    for path in written.parent.glob(f"checkpoint_*_{match[2]}of{match[3]}.safetensors"):
        if other := PART.fullmatch(path.name):
            mine[int(other[1])] = path
    now = int(match[1])
    before = max((step for step in mine if step < now), default=now)
    for step, path in mine.items():
        if step not in (now, before):
            path.unlink(missing_ok=True)


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy values by name. Raises ValueError when names or shapes differ."""
    wrong = sorted(n for n in targets.keys() ^ sources.keys()) or [
        n for n in targets if targets[n].shape != sources[n].shape
    ]
    if wrong:
        raise ValueError(f"the weights are of another model: {wrong[0]} is missing or has another shape")
    for name, target in targets.items():
        target.copy_(sources[name])
