"""DPO Trainer: which of two pictures was preferred, by Diffusion-DPO (distill_core/methods/dpo.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.dpo import STUDENT, DPOConfig
from ...distill_core.presets.recipe import AUTO, own_description
from ...distill_core.training.student import StudentConfig
from ..common import setting_input
from ..datasets import Dataset
from ..host.kept import picture_size
from ..host.model import facts_of
from .base import Trainer, lora_targets
from .inputs import loop_without_discriminator, run_name_input, steps_input
from .tune import ORDINARY, student_inputs, tuned_student, turbo_steps_input


def data_inputs() -> list:
    """What learns, and from which pairs."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model that learns what is preferred, including its LoRAs. As it is, it is the reference. It "
            "is never modified.",
        ),
        Dataset.Input(
            "dataset", tooltip="Pairs of a preferred and a rejected picture, of Picture Folder with rejected_folder."
        ),
        run_name_input("my_preference"),
        steps_input(1000),
    ]


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        setting_input(io.Float, DPOConfig, "beta", default=DPOConfig().beta, min=0.01, max=1e6, step=100.0, round=0.01),
        setting_input(io.Combo, DPOConfig, "preference_levels", default=DPOConfig().preference_levels),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=1.0,
            max=30.0,
            step=0.1,
            optional=True,
            tooltip="Guidance scale at which you sample the model, for the pictures during and after the training, "
            "which itself has none. A turbo (preference_levels = student) is sampled at its own.",
        ),
        turbo_steps_input(),
    ]


class DPOTrainer(Trainer):
    USUAL = ORDINARY

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "DPOTrainer",
            "DPO Trainer",
            "Trains a LoRA by preferences (Diffusion-DPO): of two pictures of a text it learns which was preferred. "
            "For a model of many steps, or for a turbo at its own few steps.",
            aliases=[
                *("dpo", "preference", "preferences", "rlhf", "human feedback", "alignment", "direct preference"),
                *("like dislike", "rejected", "better worse", "tune", "fine-tune", "aesthetic"),
            ],
            task=data_inputs(),
            method=method_inputs(),
            loop=loop_without_discriminator(),
            student=student_inputs(),
        )

    @classmethod
    def sampling(cls, widgets, start) -> tuple[tuple[float, ...], StudentConfig, str]:
        if widgets.preference_levels == STUDENT:
            return tuned_student(widgets, start, picture_size(widgets.model, widgets.dataset))
        if widgets.preset != AUTO or widgets.turbo_steps:
            raise ValueError(
                "preset and turbo_steps are of a turbo, which is trained with preference_levels = student: choose "
                "that, or set them to auto and 0"
            )
        said = "trained at all noise levels of the model, for sampling it as before"
        _, turbo = own_description(facts_of(widgets.model))
        if turbo:
            said += f". {turbo} says that it is a turbo, whose few steps only preference_levels = student keeps"
        return (), StudentConfig(widgets.rank or start.rank, lora_targets(widgets), "euler", cfg=widgets.cfg), said

    @classmethod
    def method(cls, widgets, levels, start) -> DPOConfig:
        return DPOConfig(student_sigmas=levels, beta=widgets.beta, preference_levels=widgets.preference_levels)

    @classmethod
    def extra(cls, widgets) -> dict:
        return {"tunes": True}


NODES = [DPOTrainer]
