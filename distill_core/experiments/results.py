"""Results of `compare` on disk: a JSON file with the figures and their intervals, and beside it a safetensors file with
the figures of every resample, from which the interval of any difference follows, and with some latents to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..evaluation.intervals import Figure
from ..evaluation.metrics import Figures
from ..files import load_tensors, save_json, save_tensors

LATENTS = "latents"
CLOTHES = "clothes"  # the ground of results that name none: there was no other
Scores = dict[str, Figures]  # by number of steps
Shown = dict[str, torch.Tensor]  # the first latents of the evaluation [N, C, H, W], by number of steps


def result_path(folder: Path, name: str, seed: int | None = None) -> Path:
    """seed: None for the teacher, whom no seed changes."""
    ending = "" if seed is None else f"-{seed}"
    return folder / f"{name.replace(' ', '_').replace(',', '').replace(':', '')}{ending}.json"


def save_result(path: Path, scores: Scores, shown: Shown | None = None, **more: Any) -> None:
    """Write both files; ``more`` goes into the JSON."""
    tensors = {f"{steps}/{name}": f.replicates for steps, of in scores.items() for name, f in of.items()}
    tensors |= {f"{steps}/{LATENTS}": latents.half() for steps, latents in (shown or {}).items()}
    save_tensors(path.with_suffix(".safetensors"), tensors)
    plain = {steps: {name: figure.plain() for name, figure in of.items()} for steps, of in scores.items()}
    save_json(path, {**more, "scores": plain})


def read_result(path: Path) -> dict[str, Any]:
    """A result with its scores as figures. One of an older version has values only; their intervals are not known."""
    result = json.loads(path.read_text())
    replicates: dict[str, torch.Tensor] = {}
    if path.with_suffix(".safetensors").exists() and "images" in result:
        replicates, _ = load_tensors(path.with_suffix(".safetensors"))
    result["scores"] = {
        steps: {
            name: Figure(
                value["value"] if isinstance(value, dict) else value, replicates.get(f"{steps}/{name}", torch.zeros(0))
            )
            for name, value in of.items()
        }
        for steps, of in result["scores"].items()
    }
    return result


def read_shown(path: Path) -> Shown:
    """The latents of a result in float32, most steps first. Raises ValueError without any."""
    tensors = load_tensors(path.with_suffix(".safetensors"))[0] if path.exists() else {}
    shown = {name.split("/")[0]: x.float() for name, x in tensors.items() if name.endswith(f"/{LATENTS}")}
    if not shown:
        raise ValueError(f"{path} has no samples to show: run its entry again, in another --out")
    return dict(sorted(shown.items(), key=lambda item: -int(item[0])))


def figure_of(figures: Figures, metric: str) -> Figure | None:
    """A figure by its name, None without it; "accuracy" of several word groups is their mean, "alignment"."""
    return figures.get(metric) or (figures.get("alignment") if metric == "accuracy" else None)


def check_ground(folder: Path, ground: str) -> None:
    """Raises ValueError when a folder holds results of another ground."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text()).get("ground", CLOTHES)
        if found != ground:
            raise of_another_ground(path, found, ground)


def of_another_ground(path: Path, found: str, ground: str) -> ValueError:
    return ValueError(
        f"{path} is of the ground {found!r}, not {ground!r}, and a table has one ground; choose another --out, or "
        f"--ground {found}"
    )


def check_budget(paths: list[Path], budget: float) -> None:
    """Raises ValueError for a factor that is not positive, and when one of the results that exist had another."""
    if not 0 < budget < float("inf"):
        raise ValueError(f"--budget must be a number above 0, not {budget}")
    for path in paths:
        found = json.loads(path.read_text()).get("budget", 1.0) if path.exists() else budget
        if found != budget:
            raise ValueError(
                f"{path} was trained for {found:g} times its entry's steps, not {budget:g}, and a table has one "
                f"budget; choose another --out, or --budget {found:g}"
            )


def check_images(paths: list[Path], images: int) -> None:
    """Raises ValueError when one of the results that exist was not scored on so many images: they could not be
    compared (`evaluation.frechet`)."""
    for path in paths:
        found = json.loads(path.read_text()).get("images", "another number of") if path.exists() else images
        if found != images:
            raise ValueError(
                f"{path} was scored on {found} images, not {images}, so it cannot be compared with new results; "
                f"choose another --out{'' if isinstance(found, str) else f', or --images {found}'}"
            )
