"""What the trainer nodes share: how widgets become a run. A method's file adds what is its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

from comfy_api.latest import io, ui

from ...distill_core.methods.config import MethodConfig
from ...distill_core.methods.defaults import NO_PRESET, StartingValues, levels_for, preset_levels, starting_values
from ...distill_core.training.loop import TrainConfig
from ...distill_core.training.run import RunFolder, StudentConfig
from ..common import CATEGORY, OF_PRESET, first_of_each
from ..host.folders import run_folder
from ..host.model import facts_of, family_of, training_process_of
from ..host.parts import Parts
from ..host.results import as_image, report
from ..host.training import Request, train_in_graph
from .inputs import LORA, loop_inputs, preview_inputs, student_inputs


class Trainer(io.ComfyNode):
    """A method's node: `define_schema` by `schema`, `method` from its widgets, and `extra` if it needs more."""

    @classmethod
    def schema(
        cls,
        name: str,
        display_name: str,
        description: str,
        *,
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
            description=f"{description} You can cancel at any time: a checkpoint and a usable LoRA stay, and queueing "
            "the same run name resumes the run.",
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
                    tooltip="For Save Turbo LoRA or core's Save LoRA. If all weights were trained: their differences.",
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For core's Plot Loss Graph."),
                io.Image.Output(
                    display_name="report", tooltip="Curves and, with a VAE and preview prompts, before and after."
                ),
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
        request = cls.request(preview_positive=list(preview_positive), **first_of_each(inputs))
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
        widgets = SimpleNamespace(**{**usual, "preview_positive": (), **given})
        start = starting_values(family_of(widgets.model))
        levels, student = student_sampling(widgets, start)
        train = TrainConfig(
            steps=widgets.steps,
            batch_size=widgets.batch_size,
            accumulation=widgets.accumulation,
            student_lr=widgets.student_lr or (start.student_lr if student.rank else start.full_lr),
            discriminator_lr=widgets.discriminator_lr or start.discriminator_lr,
            discriminator_updates=widgets.discriminator_updates,
            ema_decay=widgets.ema_decay,
            precision=widgets.precision,
            checkpoint_every=widgets.checkpoint_every,
            seed=widgets.seed,
        )
        return Request(
            model=widgets.model,
            dataset=widgets.dataset,
            run_name=widgets.run_name,
            method=cls.method(widgets, levels, start),
            train=train,
            student=student,
            parts=cls.parts(widgets),
            checkpointing=widgets.gradient_checkpointing,
            vae=widgets.vae,
            preview_positive=widgets.preview_positive,
            preview_negative=widgets.preview_negative,
            preview_every=widgets.preview_every,
            **cls.extra(widgets),
        )

    @classmethod
    def method(cls, widgets: SimpleNamespace, levels: tuple[float, ...], start: StartingValues) -> MethodConfig:
        """The method's settings from the widgets, for a student at ``levels``."""
        raise NotImplementedError

    @classmethod
    def parts(cls, widgets: SimpleNamespace) -> Parts:
        """What the method takes beside the model."""
        return Parts()

    @classmethod
    def extra(cls, widgets: SimpleNamespace) -> dict:
        """Other fields of `Request` that only this method sets."""
        return {}


def student_sampling(widgets: SimpleNamespace, start: StartingValues) -> tuple[tuple[float, ...], StudentConfig]:
    """The student's levels; its LoRA (rank 0: all weights) and the sampler that is written into the file.

    Raises ValueError for a LoRA's layers where all weights are trained.
    """
    if widgets.preset == NO_PRESET:
        levels, usual, options = levels_for(training_process_of(widgets.model), widgets.target_steps), "renoise", {}
    else:
        levels, usual, options = preset_levels(facts_of(widgets.model), widgets.preset, widgets.target_steps)
    own_choice = widgets.sampler not in (OF_PRESET, usual)
    sampling = (widgets.sampler, {}) if own_choice else (usual, options)
    targets = tuple(text.strip() for text in widgets.lora_targets.split(",") if text.strip())
    if widgets.train == LORA:
        return levels, StudentConfig(widgets.rank or start.rank, targets, *sampling)
    if targets:
        raise ValueError("lora_targets are a LoRA's layers: leave it empty to train all weights, or set train to LoRA")
    return levels, StudentConfig(0, (), *sampling)
