"""What the trainer nodes share: inputs, and how widgets become a run. A method's file adds what is its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

from comfy_api.latest import io, ui

from ...distill_core.diffusion.samplers import SAMPLERS
from ...distill_core.methods.base import MethodConfig
from ...distill_core.methods.defaults import (
    MOST_STEPS,
    NO_PRESET,
    StartingValues,
    levels_for,
    preset_levels,
    starting_values,
)
from ...distill_core.methods.losses import GAN_LOSSES
from ...distill_core.presets.table import presets
from ...distill_core.training.loop import PRECISIONS, TrainConfig
from ...distill_core.training.run import RunFolder, StudentConfig
from ..common import CATEGORY, OF_PRESET, SEED_MAX
from ..datasets import Dataset
from ..host.folders import run_folder
from ..host.model import facts_of, family_of, training_process_of
from ..host.results import as_image, report
from ..host.training import Request, train_in_graph

LORA, ALL_WEIGHTS = "LoRA", "all weights"
AUTO_ZERO = "0 takes the family's starting value."


def task_inputs(dataset: str, target_steps: int) -> list:
    """What every run needs. dataset: which datasets serve.  target_steps: its default."""
    return [
        io.Model.Input("model", tooltip="The teacher, with LoRAs and ModelSampling nodes. It is not changed."),
        Dataset.Input("dataset", tooltip=dataset),
        io.String.Input(
            "run_name",
            default="my_turbo",
            tooltip="Folder under output/turbo_distill/runs; the LoRA is output/loras/turbo_distill/NAME. The "
            "same name and settings go on where a run stopped; other settings need another name.",
        ),
        io.Int.Input(
            "target_steps",
            default=target_steps,
            min=1,
            max=MOST_STEPS,
            tooltip="Steps the student is to be sampled with.",
        ),
        io.Int.Input("steps", default=2000, min=1, max=1000000, tooltip="Training steps; more can be added."),
    ]


def loop_inputs() -> list:
    """What decides how long and how fast it learns."""
    return [
        io.Int.Input("batch_size", default=4, min=1, max=4096, optional=True, tooltip="Items at once; hinge needs 2."),
        io.Int.Input(
            "accumulation",
            default=1,
            min=1,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="Micro-batches a step: a larger batch in the memory of a smaller one.",
        ),
        io.Float.Input(
            "student_lr",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-7,
            optional=True,
            tooltip=f"Learning rate of the LoRA, or of all weights. {AUTO_ZERO}",
        ),
        io.Float.Input(
            "discriminator_lr",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-7,
            optional=True,
            tooltip=f"Learning rate of the heads, mostly 2-10 times the student's. {AUTO_ZERO}",
        ),
        io.Int.Input(
            "discriminator_updates",
            default=1,
            min=1,
            max=20,
            optional=True,
            advanced=True,
            tooltip="Discriminator steps a student step.",
        ),
        io.Float.Input(
            "ema_decay",
            default=0.99,
            min=0.0,
            max=0.9999,
            step=0.001,
            round=1e-4,
            optional=True,
            advanced=True,
            tooltip="Of the averaged student, which is what is saved.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            optional=True,
            tooltip="Compute each block twice and hold far less memory. Off is faster where memory is plenty.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            optional=True,
            advanced=True,
            tooltip="Of the network's arithmetic; auto is bfloat16 on a GPU that has it.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=SEED_MAX,
            optional=True,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Everything random of the run comes from it.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=250,
            min=1,
            max=100000,
            optional=True,
            advanced=True,
            tooltip="Steps between checkpoints. One is also written when you cancel.",
        ),
    ]


def weight_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """The weight of a term of the student's loss."""
    return io.Float.Input(name, default=default, min=0.0, max=1000.0, step=0.1, optional=True, tooltip=tooltip)


def loss_input(default: str, of: str) -> io.Combo.Input:
    return io.Combo.Input(
        "loss",
        options=list(GAN_LOSSES),
        default=default,
        optional=True,
        advanced=True,
        tooltip=f"Adversarial loss. {default}: {of}. nonsaturating also works at batch size 1.",
    )


def r1_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "r1",
        default=default,
        min=0.0,
        max=1000.0,
        step=0.00001,
        round=1e-7,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


def student_inputs() -> list:
    """What the student is, and how it is to be sampled."""
    return [
        io.Combo.Input(
            "preset",
            options=[NO_PRESET, *presets()],
            default=NO_PRESET,
            optional=True,
            advanced=True,
            tooltip="Train at the levels of a known turbo model, to be sampled like it; none: evenly spaced ones.",
        ),
        io.Combo.Input(
            "sampler",
            options=[OF_PRESET, *SAMPLERS],
            default=OF_PRESET,
            optional=True,
            advanced=True,
            tooltip="What the student is meant to be sampled with, written into the file. Without a preset: renoise "
            "(LADD). ancestral keeps more variety in 2-4 steps on the mini model.",
        ),
        io.Combo.Input(
            "train",
            options=[LORA, ALL_WEIGHTS],
            default=LORA,
            optional=True,
            tooltip="LoRA: small, one copy of the model in memory. all weights: full fine-tuning of a second copy, "
            "about 20 bytes a weight more, and a file of 4 bytes a weight.",
        ),
        io.Int.Input("rank", default=0, min=0, max=1024, optional=True, tooltip=f"Rank of the LoRA. {AUTO_ZERO}"),
        io.String.Input(
            "lora_targets",
            default="",
            optional=True,
            advanced=True,
            tooltip="Only layers whose name contains one of these texts, with commas between, e.g. attn. Empty: all.",
        ),
    ]


def preview_inputs(vae: bool) -> list:
    """Pictures while it trains. vae: whether the VAE is for nothing else."""
    return [
        *([io.Vae.Input("vae", optional=True, tooltip="For pictures while it trains and for the report.")] * vae),
        io.Conditioning.Input("preview_positive", optional=True, tooltip="Prompts of these pictures: one or a list."),
        io.Conditioning.Input("preview_negative", optional=True, tooltip="For the guided teacher in the report."),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=100000,
            optional=True,
            advanced=True,
            tooltip="Steps between sampled pictures on the node (0: only curves). Needs VAE and preview_positive.",
        ),
    ]


class Trainer(io.ComfyNode):
    """A method's node: `define_schema` by `schema`, `method` from its widgets, and `beside` if it needs more."""

    @classmethod
    def schema(
        cls,
        name: str,
        display_name: str,
        description: str,
        aliases: list[str],
        task: list,
        method: list,
        parts: Sequence = (),
        preview_vae: bool = True,
    ) -> io.Schema:
        """The node's schema: its ``task`` (`task_inputs`), what it needs beside the model (``parts``), the loop's
        inputs, the ``method``'s own, the student's and the preview's (with a VAE unless ``parts`` have one)."""
        return io.Schema(
            node_id=f"TurboDistill{name}",
            display_name=display_name,
            category=CATEGORY,
            description=f"{description} Cancel at any time: a checkpoint and a usable LoRA stay, and queueing the same "
            "run name goes on.",
            search_aliases=["distill", "turbo lora", "lightning", "train", "few steps", *aliases],
            is_input_list=True,
            inputs=[*task, *parts, *loop_inputs(), *method, *student_inputs(), *preview_inputs(preview_vae)],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The student: the model with its LoRA, or with all its new weights. Core's Save Model and "
                    "Save Checkpoint write it as a model of its own.",
                ),
                io.Custom("LORA_MODEL").Output(
                    display_name="lora",
                    tooltip="For Save Turbo LoRA or core's Save LoRA. Of all weights it is their differences.",
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For core's Plot Loss Graph."),
                io.Image.Output(display_name="report", tooltip="Curves and, with VAE and preview, before and after."),
                io.String.Output(display_name="run_name", tooltip="For Training Report."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, **inputs) -> float:
        """The report's date; a run that has not ended always runs again, which resumes it."""
        path = RunFolder(run_folder(run_name[0])).report
        return path.stat().st_mtime if path.is_file() else math.nan

    @classmethod
    def execute(cls, preview_positive=(), **inputs) -> io.NodeOutput:
        values = {name: value[0] for name, value in inputs.items()}
        request = cls.request(preview_positive=list(preview_positive), **values)
        student, lora, loss_map = train_in_graph(request)
        picture = report(
            request.run_name, request.model, request.vae, request.preview_positive, request.preview_negative
        )
        image = as_image(picture)
        return io.NodeOutput(student, lora, loss_map, image, request.run_name, ui=ui.PreviewImage(image, cls=cls))

    @classmethod
    def request(cls, **given) -> Request:
        """The node's widgets as the core's settings; those left out have their defaults, 0 the family's start."""
        usual = {entry.id: getattr(entry, "default", None) for entry in cls.define_schema().inputs}
        w = SimpleNamespace(**{**usual, "preview_positive": (), **given})
        start = starting_values(family_of(w.model))
        levels, student = student_sampling(w, start)
        rate = start.student_lr if student.rank else start.full_lr
        train = TrainConfig(
            steps=w.steps,
            batch_size=w.batch_size,
            accumulation=w.accumulation,
            student_lr=w.student_lr or rate,
            discriminator_lr=w.discriminator_lr or start.discriminator_lr,
            discriminator_updates=w.discriminator_updates,
            ema_decay=w.ema_decay,
            precision=w.precision,
            checkpoint_every=w.checkpoint_every,
            seed=w.seed,
        )
        return Request(
            w.model,
            w.dataset,
            w.run_name,
            cls.method(w, levels, start),
            train,
            student,
            w.lora_targets,
            w.gradient_checkpointing,
            w.vae,
            w.preview_positive,
            w.preview_negative,
            w.preview_every,
            **cls.beside(w),
        )

    @classmethod
    def method(cls, w: SimpleNamespace, levels: tuple[float, ...], start: StartingValues) -> MethodConfig:
        """The method's settings from the widgets ``w``, for a student at ``levels``."""
        raise NotImplementedError

    @classmethod
    def beside(cls, w: SimpleNamespace) -> dict:
        """Fields of `Request` that only this method has."""
        return {}


def student_sampling(w: SimpleNamespace, start: StartingValues) -> tuple[tuple[float, ...], StudentConfig]:
    """The student's levels; its LoRA (rank 0: all weights) and the sampler that is written into the file.

    Raises ValueError for a LoRA's layers where all weights are trained.
    """
    if w.preset == NO_PRESET:
        levels, usual, options = levels_for(training_process_of(w.model), w.target_steps), "renoise", {}
    else:
        levels, usual, options = preset_levels(facts_of(w.model), w.preset, w.target_steps)
    own_choice = w.sampler not in (OF_PRESET, usual)
    sampling = (w.sampler, {}) if own_choice else (usual, options)
    if w.train == LORA:
        return levels, StudentConfig(w.rank or start.rank, (), *sampling)
    if w.lora_targets.strip():
        raise ValueError("lora_targets are a LoRA's layers: leave it empty to train all weights, or set train to LoRA")
    return levels, StudentConfig(0, (), *sampling)
