"""What a training run leaves behind: its LoRA on a MODEL and as a file, and the picture of Training Report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import comfy.sd
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...distill_core.diffusion.schedules import grid_sigmas
from ...distill_core.evaluation import live_plots
from ...distill_core.files import load_tensors, read_lora, save_lora
from ...distill_core.presets.recipe import Recipe, make_recipe
from ...distill_core.training.run import RunFolder
from .folders import lora_file, run_folder
from .model import facts_of, training_process_of
from .sampling import sample_latent
from .teacher import join_conditionings

MOST_COLUMNS = 10
WIDTH = 860  # of the curves, in pixels


class TurboLora(dict):
    """A LORA_MODEL as core's nodes take it (name -> tensor), with the description that makes it a turbo LoRA."""

    def __init__(self, state: dict[str, Tensor], description: dict) -> None:
        super().__init__(state)
        self.description = description


def read_turbo_lora(path: Path) -> TurboLora:
    return TurboLora(*read_lora(path))


def with_turbo_lora(model, path: Path):
    """MODEL with the LoRA in ``path`` and its metadata attached, as core's LoRA loader gives it."""
    lora, metadata = load_tensors(path)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0, lora_metadata=metadata)
    return patched


def save_turbo_lora(lora, filename_prefix: str) -> tuple[str, Path]:
    """Write a LORA_MODEL into the output folder: the name that LoRA loaders list it under, and its path there.

    Raises ValueError for a LORA_MODEL without a description.
    """
    if not isinstance(lora, TurboLora):
        raise ValueError(
            "this LORA_MODEL does not say how it was distilled: connect a trainer of this pack, or use core's Save LoRA"
        )
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    path = Path(subfolder, f"{name}_{counter:05}_.safetensors")
    save_lora(Path(folder, path.name), dict(lora), lora.description)
    return os.path.relpath(path, "loras") if path.parts[0] == "loras" else path.name, path


def log_date(run_name: str) -> float:
    """When the run last did a step; 0 if it never did."""
    log = RunFolder(run_folder(run_name)).log if run_name else Path()
    return log.stat().st_mtime if log.is_file() else 0.0


def as_image(picture: Image.Image) -> Tensor:
    """A picture as the host's IMAGE [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)


def report(run_name: str, model=None, vae=None, positive: Sequence = (), negative=None, seed: int = 0) -> Image.Image:
    """The picture of Training Report. Raises ValueError for a run that has no log yet."""
    folder = RunFolder(run_folder(run_name))
    logs = folder.logs()
    if not logs:
        raise ValueError(f"there is no run {run_name!r} in output/turbo_distill/runs, or it has not done a step")
    condition = folder.condition()
    title = f"{run_name}: step {logs[-1]['step']}; {condition.word}: {condition.advice}"
    if model is None or vae is None or not positive:
        return live_plots.curves(logs, WIDTH, title=title)
    lora, prompts = lora_file(run_name), list(positive)[:MOST_COLUMNS]
    rows = before_after(model, vae, lora, prompts=prompts, negative=negative, started=folder.started(), seed=seed)
    grid = live_plots.grid(rows, "the same noise in every column")
    return live_plots.stack([live_plots.curves(logs, max(WIDTH, grid.width), title=title), grid])


def before_after(
    model, vae, lora: Path, *, prompts: Sequence, negative, started: dict, seed: int
) -> list[tuple[str, Tensor]]:
    """Rows (label, images [N, H, W, 3]): teacher and student at 1 step and at the trained number of steps.

    started: what the run noted of itself (`RunFolder.started`): the dataset's guidance and the shape of a latent.
    """
    student, trained_steps = with_turbo_lora(model, lora), len(read_turbo_lora(lora).description["sigmas"])
    cfg = started["guidance"] if negative is not None else 1.0
    channels, *size = started["latent_shape"]
    frames = (1,) if model.get_model_object("latent_format").latent_dimensions == 3 else ()
    latent = {"samples": torch.zeros(len(prompts), channels, *frames, *size)}
    positive, process = join_conditionings(prompts), training_process_of(model)
    teachers, students = [], []
    for steps in sorted({1, trained_steps}):
        label = f"{steps} step{'s' * (steps > 1)}"
        recipe = Recipe(grid_sigmas(process, steps), "euler", {}, cfg, "")
        sampled, _ = sample_latent(model, positive, negative, latent=latent, recipe=recipe, seed=seed)
        teachers.append((f"teacher, {label}\n{'guided' if cfg != 1 else 'cfg 1'}", decode(vae, sampled)))
        recipe = make_recipe(facts_of(student), steps=steps)
        sampled, _ = sample_latent(student, positive, None, latent=latent, recipe=recipe, seed=seed)
        students.append((f"student, {label}", decode(vae, sampled)))
    return [*teachers, *students]


def decode(vae, latent: dict) -> Tensor:
    """Images [N, H, W, 3] of a LATENT; the first frame of a video."""
    images = vae.decode(latent["samples"])
    return images[:, 0] if images.ndim == 5 else images
