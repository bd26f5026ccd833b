"""De-Distil Adapter: a training adapter for any turbo model, from its own samples (distill_core/methods/adapter.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.adapter import AdapterConfig
from ...distill_core.training.student import StudentConfig
from ..host.datasets import parse_sizes
from ..host.kept import TurboSamples, empty_prompt, kept_prompts
from .base import Trainer
from .inputs import loop_without_discriminator, run_name_input, steps_input
from .tune import (
    ORDINARY,
    clip_input,
    count_input,
    student_inputs,
    tuned_student,
    turbo_input,
    turbo_recipe,
    turbo_steps_input,
)


def data_inputs() -> list:
    """What the turbo samples."""
    return [
        turbo_input(),
        run_name_input("my_adapter"),
        steps_input(1000),
        clip_input("positive"),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="Prompts that the turbo samples: a list, of Prompt List and CLIP Text Encode. Not connected: those "
            "that come with the pack, encoded by clip.",
        ),
        turbo_steps_input(),
        io.String.Input(
            "sizes",
            default="1024x1024",
            optional=True,
            tooltip="Image sizes as width x height in pixels. Several sizes, separated by commas, are used in turn.",
        ),
        count_input(512),
    ]


class DeDistilAdapter(Trainer):
    LISTS = ("preview_positive", "positive")
    USUAL = ORDINARY

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "AdapterTrainer",
            "De-Distil Adapter",
            "Makes a training adapter for any turbo model from its own samples: a LoRA that undoes distillation while "
            "another LoRA is trained, and is left out when that is used.",
            aliases=[
                "de-distill",
                "dedistill",
                "training adapter",
                "undistill",
                "assistant lora",
                "turbo lora training",
            ],
            task=data_inputs(),
            method=[],
            loop=loop_without_discriminator(),
            student=student_inputs(),
        )

    @classmethod
    def sizes(cls, widgets) -> tuple[tuple[int, int], ...]:
        """Latent sizes [H, W]."""
        return parse_sizes(widgets.sizes, widgets.model.get_model_object("latent_format").spacial_downscale_ratio)

    @classmethod
    def picture_size(cls, widgets) -> tuple[int, int]:
        """Width and height of the first size in pixels."""
        scale = widgets.model.get_model_object("latent_format").spacial_downscale_ratio
        height, width = cls.sizes(widgets)[0]
        return width * scale, height * scale

    @classmethod
    def sampling(cls, widgets, start) -> tuple[tuple[float, ...], StudentConfig, str]:
        return tuned_student(widgets, start, cls.picture_size(widgets))

    @classmethod
    def method(cls, widgets, levels, start) -> AdapterConfig:
        return AdapterConfig(student_sigmas=levels)

    @classmethod
    def extra(cls, widgets) -> dict:
        kept = TurboSamples(
            widgets.model,
            kept_prompts(widgets.positive, widgets.clip),
            turbo_recipe(widgets, cls.picture_size(widgets)),
            cls.sizes(widgets),
            widgets.keep_count,
            empty=empty_prompt(widgets.clip),
            batch_size=widgets.batch_size,
            states=False,
        )
        return {"tunes": True, "kept": kept}


NODES = [DeDistilAdapter]
