"""What a training run leaves behind: its LoRA on a MODEL and as a file, and the picture of Training Report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...distill_core.digests import digest_tensor, weights_digest
from ...distill_core.evaluation import live_plots
from ...distill_core.files import load_tensors, replacing
from ...distill_core.lora_files import LORA_FORMAT, check_lora, read_lora, save_lora
from ...distill_core.models.strengths import split_strengths
from ...distill_core.presets.origin import origin_notes
from ...distill_core.presets.recipe import describe_metadata
from ...distill_core.presets.table import counted
from ...distill_core.training.run_folder import RunFolder
from .conditioning import cond_of
from .folders import lora_file, run_folder
from .identity import LAYOUT, loras_below, weights_identity
from .merge import merged_patches
from .shown import Shown, items_file, of_items, of_prompts
from .side_by_side import pixels_of, student_recipe, teacher_recipe
from .strengths import EMBEDDING

MOST_COLUMNS = 10
WIDTH = 860  # of the curves, in pixels
USUAL_STEPS = 25  # of a teacher whose dataset does not say, such as real images


class TurboLora(dict):
    """A LORA_MODEL as core's nodes take it (name -> tensor), with the description that makes it a turbo LoRA."""

    def __init__(self, state: dict[str, Tensor], description: dict, student: Any = None) -> None:
        """student: the MODEL with this LoRA on it."""
        super().__init__(state)
        self.description, self.student = description, student

    def merged(self) -> TurboLora:
        """This LoRA and those that were below it while it was trained, as one. Raises ValueError if unknown."""
        if not self.description.get("below"):
            return self
        if self.student is None:
            raise ValueError("the LoRA below this student is not known here: connect the trainer's lora output itself")
        description = {name: value for name, value in self.description.items() if name != "below"}
        return TurboLora(merged_patches(self.student), {**description, "weights": "merged"})


def read_turbo_lora(path: Path) -> TurboLora:
    return TurboLora(*read_lora(path))


def with_turbo_lora(model, path: Path):
    """MODEL with the LoRA in ``path`` and its metadata attached, as core's LoRA loader gives it; for Editing Strengths
    with its embedding of strengths, too."""
    lora, metadata = load_tensors(path)
    check_lora(lora, path)
    lora, embedding = split_strengths(lora)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0, lora_metadata=metadata)
    if embedding:
        patched.set_attachments(EMBEDDING, embedding)
    return patched


def save_turbo_lora(lora, filename_prefix: str, merge_upstream: bool = False) -> tuple[str, Path, bool]:
    """Write a LORA_MODEL into the output folder: the name that LoRA loaders list it under, its path there, and whether
    the newest file of that prefix was the same, so that no other was written.

    merge_upstream: together with the LoRAs that were below it (`TurboLora.merged`).
    Raises ValueError for a LORA_MODEL without a description.
    """
    if not isinstance(lora, TurboLora):
        raise ValueError(
            "this LORA_MODEL does not say how it was distilled: connect a trainer of this pack, or use core's Save LoRA"
        )
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    lora = lora.merged() if merge_upstream else lora
    newest = Path(folder, f"{name}_{counter - 1:05}_.safetensors")
    same = holds(newest, lora)
    path = Path(subfolder, newest.name if same else f"{name}_{counter:05}_.safetensors")
    if not same:
        save_lora(Path(folder, path.name), dict(lora), lora.description)
    return os.path.relpath(path, "loras") if path.parts[0] == "loras" else path.name, path, same


def holds(path: Path, lora: TurboLora) -> bool:
    """Whether a file is there and has just these tensors and this description."""
    try:
        state, description = read_lora(path)
    except ValueError:
        return False
    equal = state.keys() == lora.keys() and all(torch.equal(state[name], lora[name]) for name in state)
    return equal and description == {"format": LORA_FORMAT, **lora.description}


def log_date(run_name: str) -> float:
    """When the run last did a step; 0 if it never did."""
    log = RunFolder(run_folder(run_name)).log if run_name else Path()
    return log.stat().st_mtime if log.is_file() else 0.0


def as_image(picture: Image.Image) -> Tensor:
    """A picture as the host's IMAGE [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)


def lasting_report(
    run_name: str, model, vae, positive: Sequence, negative, kept: Sequence = (), teacher=None
) -> Image.Image:
    """`report`, kept in the run's folder as long as its log, its student and what is looked at are the same."""
    folder, digest = RunFolder(run_folder(run_name)), hashlib.sha256()
    for file in (folder.log, lora_file(run_name), folder.path / "started.json", items_file(folder.path)):
        digest.update(file.read_bytes() if file.is_file() else b"none")
    for conditioning in [*positive, *([negative] if negative else []), *kept[:MOST_COLUMNS]]:
        for name, value in cond_of(conditioning).tensors().items():
            digest_tensor(digest, name, value)
    digest.update(weights_digest(vae.first_stage_model.state_dict()).encode() if vae is not None else b"none")
    made_of, path = digest.hexdigest(), folder.path / "report.png"
    try:
        with Image.open(path) as picture:
            if picture.info.get("made_of") == made_of:
                return picture.convert("RGB")
    except OSError:
        pass  # none yet, or a damaged one: it is drawn again
    picture, info = report(run_name, model, vae, positive, negative, kept=kept, teacher=teacher), PngInfo()
    info.add_text("made_of", made_of)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)
    return picture


def report(
    run_name: str,
    model=None,
    vae=None,
    positive: Sequence = (),
    negative=None,
    seed: int = 0,
    kept: Sequence = (),
    teacher=None,
) -> Image.Image:
    """The picture of Training Report; of a run whose log is gone, as far as its LoRA goes.

    kept: prompts that a tuned turbo was to keep.  teacher: the MODEL that taught, where it is another. Raises
    ValueError for a run that has left neither.
    """
    folder, lora = RunFolder(run_folder(run_name)), lora_file(run_name)
    logs = folder.logs()
    if not logs and not lora.is_file():
        raise ValueError(f"there is no run {run_name!r} in output/turbo_distill/runs, or it has not done a step")
    condition = folder.condition()
    title = f"{run_name}: its log is missing, so there are no curves"
    if condition is not None:
        title = f"{run_name}: step {logs[-1]['step']}; {condition.word}: {condition.advice}"
    ready = lora.is_file() and (folder.path / "started.json").is_file() and None not in (model, vae)
    own = items_file(folder.path).is_file()
    if not ready or not (positive or own):
        return live_plots.curves(logs, WIDTH, title=title)
    started = folder.started()
    if own:
        columns = {"the same noise in every column": of_items(model, folder.path, MOST_COLUMNS)}
    else:
        listed = {"the same noise in every column": list(positive)}
        if started.get("tunes"):
            listed = {"before and after, the same noise in every column": list(positive), "prompts to keep": list(kept)}
        columns = {
            text: of_prompts(model, some[:MOST_COLUMNS], negative, started["latent_shape"])
            for text, some in listed.items()
            if some
        }
    rows = tuned if started.get("tunes") else partial(before_after, teacher=teacher)
    grids = [live_plots.grid(rows(model, vae, lora, shown, started, seed), text) for text, shown in columns.items()]
    width = max(WIDTH, *(grid.width for grid in grids))
    return live_plots.stack([live_plots.curves(logs, width, title=title), *grids])


def tuned(model, vae, lora: Path, shown: Shown, started: dict, seed: int) -> list[tuple[str, Tensor]]:
    """Rows (label, images [N, H, W, 3]): a model and what it was tuned to, both at a turbo's own steps, or at the usual
    ones where the file names none."""
    student, levels = with_turbo_lora(model, lora), read_turbo_lora(lora).description.get("sigmas")
    cfg = started["guidance"] if shown.guidable else 1.0
    recipe = student_recipe(student, len(levels)) if levels else teacher_recipe(model, usual_steps(started), cfg)
    steps = counted(len(recipe.sigmas) - 1)
    return [
        *shown.given_rows(vae),
        *(
            (f"{name}, {steps}", shown.row(either, vae, recipe, seed))
            for name, either in (("before", model), ("after", student))
        ),
    ]


def usual_steps(started: dict) -> int:
    """Of the teacher: those of its dataset, where it says."""
    return started.get("teacher_steps", USUAL_STEPS)


def report_warnings(run_name: str, model) -> list[str]:
    """What is to be said of the run's student above this MODEL (`origin_notes`); nothing where there is none yet."""
    lora = lora_file(run_name)
    if model is None or not lora.is_file():
        return []
    described = describe_metadata(load_tensors(lora)[1])
    return origin_notes(described, weights_identity(model), LAYOUT, loras_below(model))


def before_after(
    model, vae, lora: Path, shown: Shown, started: dict, seed: int, teacher=None
) -> list[tuple[str, Tensor]]:
    """Rows (label, images [N, H, W, 3]): what they are given; the teacher at 1, at the trained number and at its usual
    number of steps, and the student at 1 and at the trained number.

    started: what the run noted of itself (`RunFolder.started`): the teacher's guidance and its steps, and its name
    where it was another than the model.  teacher: that one's MODEL; without it, the rows are the model's, and say so.
    """
    student, trained = with_turbo_lora(model, lora), len(read_turbo_lora(lora).description["sigmas"])
    usual, cfg = usual_steps(started), started["guidance"] if shown.guidable else 1.0
    rows, guide = shown.given_rows(vae), teacher or model
    name = "model" if started.get("teacher") and teacher is None else "teacher"
    for steps in sorted({1, trained, usual}):
        guided = "guided" if cfg != 1 else "cfg 1"
        pictures = shown.row(guide, vae, teacher_recipe(guide, steps, cfg), seed)
        rows.append((f"{name}, {counted(steps)}\n{guided}", pictures))
    for steps in sorted({1, trained}):
        recipe = student_recipe(student, steps, **pixels_of(model, shown.latent))
        rows.append((f"student, {counted(steps)}", shown.row(student, vae, recipe, seed)))
    return rows
