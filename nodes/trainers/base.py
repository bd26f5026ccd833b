"""What the trainer nodes share: how widgets become a run. A method's file adds what is its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

from comfy_api.latest import io, ui

from ...distill_core.evaluation.run_page import write_page
from ...distill_core.methods.config import MethodConfig
from ...distill_core.methods.defaults import (
    NO_PRESET,
    StartingValues,
    auto_levels,
    levels_for,
    preset_levels,
    starting_values,
)
from ...distill_core.models.strengths import StrengthsConfig
from ...distill_core.presets.recipe import AUTO
from ...distill_core.training.loop_config import TrainConfig
from ...distill_core.training.run_folder import RunFolder
from ...distill_core.training.student import StudentConfig, rank_of_file
from ..common import CATEGORY, OF_PRESET, first_of_each
from ..fingerprints import Left, dates
from ..host.folders import lora_file, run_folder
from ..host.model import facts_of, family_of, training_process_of
from ..host.parts import Parts
from ..host.results import as_image, lasting_report
from ..host.text import show_picture, show_text
from ..host.training import Request, train_in_graph
from .inputs import LORA, START_AGAIN, existing_run_input, loop_inputs, preview_inputs, student_inputs
from .settings import TrainingSettings, with_settings

# Widgets that some trainers do not have, and what stands for them.
ABSENT = {
    "dataset": None,
    "discriminator_lr": 0.0,
    "discriminator_updates": 1,
    "keep_at_least": 0.0,
    "say": None,
    "progress": logging.info,
    "notes": (),
    "teacher_cfg": 0.0,
    "strengths_told": False,
    "teacher_model": None,
}
# Words under which people look for what a trainer makes, and for turbo models in general.
SEARCH = (
    *("distill", "train lora", "train turbo", "turbo lora", "lora training", "few steps", "speed", "fast", "faster"),
    *("lightning", "hyper", "lcm", "schnell", "dmd2", "z-image", "accelerate"),
)

RUNS = Left(lambda name: dates(RunFolder(run_folder(name)).report, lora_file(name)))


class Trainer(io.ComfyNode):
    """A method's node: `define_schema` by `schema`, `method` from its widgets, and `sampling` and `extra` if it needs
    more."""

    LISTS: ClassVar[tuple[str, ...]] = ("preview_positive",)  # inputs of which all values count
    USUAL: ClassVar[dict[str, Any]] = {}  # settings of the loop whose usual values are not the core's

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
        loop: Sequence | None = None,
        student: Sequence | None = None,
        preview_vae: bool = True,
        more: Sequence = (),
    ) -> io.Schema:
        """The node's schema: its ``task`` (`task_inputs`), what it needs beside the model (``parts``), the loop's
        inputs, the ``method``'s own, the student's and the preview's (with a VAE unless ``parts`` have one).
        loop, student: None for those of every distillation.  more: what was added since, last for the sake of saved
        workflows."""
        return io.Schema(
            node_id=f"TurboDistill{name}",
            display_name=display_name,
            category=CATEGORY,
            description=f"{description} You can cancel at any time: a checkpoint and a usable LoRA stay, and queueing "
            "the same run name resumes the run.",
            search_aliases=[*SEARCH, *aliases],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *(*task, *parts, *(loop_inputs() if loop is None else loop), *method),
                *(*(student_inputs() if student is None else student), *preview_inputs(preview_vae)),
                TrainingSettings.Input(
                    "settings", optional=True, tooltip="More settings, of Training Settings. Without it: the defaults."
                ),
                existing_run_input(),
                *more,
            ],
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
        """Changes when the run's report or LoRA is another than the node left. A run that was stopped needs no other
        fingerprint: the host keeps no result of it, so it runs the node again."""
        return RUNS.fingerprint(run_name[0])

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        said: list[str] = []

        def say(text: str) -> None:
            logging.info(text)
            said.append(text)
            show_text(cls, "\n".join(said))

        def progress(text: str) -> None:
            show_text(cls, "\n".join([*said, text]))

        lists = {name: list(inputs.pop(name, ())) for name in cls.LISTS}
        request = cls.request(say=say, progress=progress, notes=said, **lists, **first_of_each(inputs))
        student, lora, loss_map = train_in_graph(request)
        picture = lasting_report(request.run_name, *request.looked_at())
        show_picture(picture)
        say(f"the whole run on one page: {write_page(RunFolder(run_folder(request.run_name)))}")
        image = as_image(picture)
        RUNS.note(request.run_name)
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **show_text(cls, "\n".join(said)).as_dict()}
        return io.NodeOutput(student, lora, loss_map, image, request.run_name, ui=shown)

    @classmethod
    def request(cls, **given) -> Request:
        """The node's widgets as the core's settings; those left out have their defaults, 0 the family's start."""
        usual = {entry.id: getattr(entry, "default", None) for entry in cls.define_schema().inputs}
        widgets = SimpleNamespace(**{**ABSENT, **usual, **dict.fromkeys(cls.LISTS, ()), **given})
        start = starting_values(family_of(widgets.model))
        levels, student, said = cls.sampling(widgets, start)
        student = with_lora(student, widgets)
        if widgets.strengths_told:
            told = StrengthsConfig(True, widgets.usual_text_strength, widgets.usual_image_strength)
            student = replace(student, strengths=told)
        say = widgets.say or logging.info
        say(said)
        train = TrainConfig(
            steps=widgets.steps,
            batch_size=widgets.batch_size,
            accumulation=widgets.accumulation,
            student_lr=widgets.student_lr,
            discriminator_lr=widgets.discriminator_lr,
            discriminator_updates=widgets.discriminator_updates,
            ema_decay=widgets.ema_decay,
            precision=widgets.precision,
            checkpoint_every=widgets.checkpoint_every,
            sample_every=widgets.preview_every,
            seed=widgets.seed,
            **cls.USUAL,
        )
        train = with_rates(with_settings(train, widgets.settings), start, student)
        if widgets.keep_at_least:
            train = replace(train, keep_at_least=widgets.keep_at_least)
        for question in train.questions():
            say(question)
        return Request(
            model=widgets.model,
            dataset=widgets.dataset,
            run_name=widgets.run_name,
            method=with_settings(cls.method(widgets, levels, start), widgets.settings),
            train=train,
            student=student,
            parts=cls.parts(widgets),
            checkpointing=widgets.gradient_checkpointing,
            vae=widgets.vae,
            preview_positive=widgets.preview_positive,
            preview_negative=widgets.preview_negative,
            say=say,
            progress=widgets.progress,
            notes=widgets.notes,
            start_again=widgets.existing_run == START_AGAIN,
            guidance=widgets.teacher_cfg or None,
            teacher=widgets.teacher_model,
            **cls.extra(widgets),
        )

    @classmethod
    def sampling(cls, widgets: SimpleNamespace, start: StartingValues) -> tuple[tuple[float, ...], StudentConfig, str]:
        """The student's levels, what it is, and a text of both (`student_sampling`)."""
        return student_sampling(widgets, start)

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


def with_lora(student: StudentConfig, widgets: SimpleNamespace) -> StudentConfig:
    """The student with what Training Settings says of its LoRA; a rank of 0 is that of the file it starts from."""
    lora = with_settings(student.lora, widgets.settings)
    if student.rank and not widgets.rank and lora.start_from:
        student = replace(student, rank=rank_of_file(lora.start_from))
    return with_settings(replace(student, lora=lora), widgets.settings)


def with_rates(train: TrainConfig, start: StartingValues, student: StudentConfig) -> TrainConfig:
    """Learning rates of 0 are the family's starting values; for Prodigy, which finds its own, they are 1."""
    usual = start.student_lr if student.rank else start.full_lr
    return replace(
        train,
        student_lr=train.student_lr or (1.0 if train.optimizer == "prodigy" else usual),
        discriminator_lr=train.discriminator_lr
        or (1.0 if train.discriminator_optimizer == "prodigy" else start.discriminator_lr),
    )


def lora_targets(widgets: SimpleNamespace) -> tuple[str, ...]:
    """The layers that lora_targets lists."""
    return tuple(text.strip() for text in widgets.lora_targets.split(",") if text.strip())


def student_sampling(widgets: SimpleNamespace, start: StartingValues) -> tuple[tuple[float, ...], StudentConfig, str]:
    """The student's levels, its LoRA (rank 0: all weights) with the sampler that is written into the file, and a text.

    Raises ValueError for a LoRA's layers where all weights are trained.
    """
    process, why = training_process_of(widgets.model), ""
    if widgets.preset == NO_PRESET:
        levels, usual, options = levels_for(process, widgets.target_steps), "renoise", {}
    elif widgets.preset == AUTO:
        levels, usual, options, why = auto_levels(facts_of(widgets.model), process, widgets.target_steps)
    else:
        levels, usual, options = preset_levels(facts_of(widgets.model), widgets.preset, widgets.target_steps)
    listed = ", ".join(f"{level:.4g}" for level in levels)
    own_choice = widgets.sampler not in (OF_PRESET, usual)
    sampling = (widgets.sampler, {}) if own_choice else (usual, options)
    said = f"the student is trained at {listed}, for the sampler {sampling[0]}" + (f" ({why})" if why else "")
    targets = lora_targets(widgets)
    if widgets.train == LORA:
        return levels, StudentConfig(widgets.rank or start.rank, targets, *sampling), said
    if targets:
        raise ValueError("lora_targets are a LoRA's layers: leave it empty to train all weights, or set train to LoRA")
    return levels, StudentConfig(0, (), *sampling), said
