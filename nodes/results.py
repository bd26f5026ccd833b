"""Save Turbo LoRA and Training Report: what a training run leaves behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import comfy.sd
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..distill_core.diffusion.schedules import grid_sigmas
from ..distill_core.evaluation import live_plots as charts
from ..distill_core.files import load_tensors, read_lora, save_lora
from ..distill_core.presets.recipe import Recipe, make_recipe
from ..distill_core.training.run import RunFolder
from .common import CATEGORY, SEED_MAX
from .host.folders import lora_file, run_folder
from .host.model import facts_of, training_process_of
from .host.sampling import sample_latent
from .host.teacher import join_conditionings


class TurboLora(dict):
    """A LORA_MODEL as core's nodes take it (name -> tensor), with the description that makes it a turbo LoRA."""

    def __init__(self, state: dict[str, Tensor], description: dict) -> None:
        super().__init__(state)
        self.description = description


def read_turbo_lora(path: Path) -> TurboLora:
    return TurboLora(*read_lora(path))


def with_turbo_lora(model, path: Path):
    """MODEL with the LoRA of ``path`` and what its file says of itself, as core's LoRA loader gives it."""
    lora, metadata = load_tensors(path)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0, lora_metadata=metadata)
    return patched


def as_image(picture: Image.Image) -> Tensor:
    """A picture as the host's IMAGE [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)


class SaveTurboLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSaveLora",
            display_name="Save Turbo LoRA",
            category=CATEGORY,
            description="Saves a distilled LoRA that says how it wants to be sampled: with Turbo Sampler on auto its "
            "levels, sampler and cfg are taken from the file. Core's LoRA loader and diffusers read it.",
            search_aliases=["export lora", "save lora"],
            is_output_node=True,
            inputs=[
                io.Custom("LORA_MODEL").Input("lora", tooltip="Of a trainer."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/turbo",
                    tooltip="Inside the output folder; under loras/ the LoRA loaders list the file.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file, as the LoRA loaders call it.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix) -> io.NodeOutput:
        if not isinstance(lora, TurboLora):
            raise ValueError(
                "this LORA_MODEL does not say how it was distilled: connect a trainer, or use core's Save LoRA"
            )
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        save_lora(Path(folder, file), dict(lora), lora.description)
        listed = os.path.relpath(Path(subfolder, file), "loras") if Path(subfolder).parts[:1] == ("loras",) else file
        return io.NodeOutput(listed, ui=ui.PreviewText(f"saved {Path(subfolder, file)}"))


class TrainingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillReport",
            display_name="Training Report",
            category=CATEGORY,
            description="One picture of a training run, also of one that was stopped: its curves, what the "
            "discriminator's figures mean, and the teacher beside the student at 1 and at the trained number of steps.",
            search_aliases=["loss curve", "plot", "before after"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.String.Input("run_name", default="my_turbo", tooltip="The run; connect a trainer's run_name."),
                io.Model.Input("model", optional=True, tooltip="The teacher, for the before/after grid."),
                io.Vae.Input("vae", optional=True, tooltip="For the grid."),
                io.Conditioning.Input("positive", optional=True, tooltip="One prompt or a list: a column each."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="With it the teacher is guided as in the dataset, else at cfg 1."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_MAX,
                    optional=True,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the grid's noise.",
                ),
            ],
            outputs=[io.Image.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, **inputs) -> float:
        log = RunFolder(run_folder(run_name[0])).log if run_name and run_name[0] else Path()
        return log.stat().st_mtime if log.is_file() else 0.0

    @classmethod
    def execute(cls, run_name, model=(None,), vae=(None,), positive=(), negative=(None,), seed=(0,)) -> io.NodeOutput:
        image = as_image(report(run_name[0], model[0], vae[0], positive, negative[0], seed[0]))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def report(run_name: str, model=None, vae=None, positive: Sequence = (), negative=None, seed: int = 0) -> Image.Image:
    """The picture of Training Report. Raises ValueError for a run that has no log yet."""
    folder = RunFolder(run_folder(run_name))
    logs = folder.logs()
    if not logs:
        raise ValueError(f"there is no run {run_name!r} in output/turbo_distill/runs, or it has not done a step")
    condition, width = folder.condition(), 860
    title = f"{run_name}: step {logs[-1]['step']}; {condition.word}: {condition.advice}"
    if model is None or vae is None or not positive:
        return charts.curves(logs, width, title=title)
    rows = before_after(model, vae, lora_file(run_name), list(positive)[:10], negative, folder.started(), seed)
    grid = charts.grid(rows, "the same noise in every column")
    return charts.stack([charts.curves(logs, max(width, grid.width), title=title), grid])


def before_after(
    model, vae, lora: Path, positive: Sequence, negative, started: dict, seed: int
) -> list[tuple[str, Tensor]]:
    """Rows (label, images [N, H, W, 3]): teacher and student at 1 and at the trained number of steps."""
    student, levels = with_turbo_lora(model, lora), len(read_turbo_lora(lora).description["sigmas"])
    cfg = started["guidance"] if negative is not None else 1.0
    channels, *size = started["latent_shape"]
    frames = (1,) if model.get_model_object("latent_format").latent_dimensions == 3 else ()
    latent = {"samples": torch.zeros(len(positive), channels, *frames, *size)}
    joined, process = join_conditionings(positive), training_process_of(model)
    rows = []
    for steps in sorted({1, levels}):
        word = f"{steps} step{'s' * (steps > 1)}"
        teacher = Recipe(grid_sigmas(process, steps), "euler", {}, cfg, "")
        text = f"teacher, {word}\n{'guided' if cfg != 1 else 'cfg 1'}"
        rows.append((text, decode(vae, sample_latent(model, joined, negative, latent, teacher, seed)[0])))
        recipe = make_recipe(facts_of(student), steps=steps)
        rows.append((f"student, {word}", decode(vae, sample_latent(student, joined, None, latent, recipe, seed)[0])))
    return sorted(rows, key=lambda row: row[0].startswith("student"))


def decode(vae, latent: dict) -> Tensor:
    """Images [N, H, W, 3] of a LATENT; the first frame of a video."""
    images = vae.decode(latent["samples"])
    return images[:, 0] if images.ndim == 5 else images


NODES = [SaveTurboLora, TrainingReport]
