"""Turbo Retention: what a tuned turbo has kept of itself, as one number and one picture."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..distill_core.evaluation.retention_report import in_text
from .common import CATEGORY, first_of_each, seed_input
from .datasets import Dataset
from .host.results import as_image
from .host.retention import measure_retention
from .host.text import show_picture, show_text
from .sampling import preset_input


class TurboRetention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillRetention",
            display_name="Turbo Retention",
            category=CATEGORY,
            description="Says what a turbo model has lost through a LoRA or tuning: blur at its few steps, sameness, "
            "other prompts drawn into the new style. One number, 1 for nothing lost, and a picture of before and "
            "after. It needs no reference pictures.",
            search_aliases=[
                "forgetting",
                "style lora",
                "blurred",
                "keep steps",
                "before after",
                "lora damage",
                "drift",
            ],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "before", tooltip="The turbo model as it was: with its turbo LoRA, without the new one."
                ),
                io.Model.Input("after", tooltip="The same model with the new LoRA, or a trainer's model output."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompts that the model is to keep, which the LoRA was not made for: a list of "
                    "at least four is best.",
                ),
                io.Latent.Input("latent_image", tooltip="Empty latent of the size to sample at."),
                io.Int.Input(
                    "noises",
                    default=4,
                    min=2,
                    max=64,
                    tooltip="Noises of each prompt. More make the figures surer; each costs both models six samplings.",
                ),
                preset_input(),
                seed_input("Seed of the noises, which are the same for both models."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the picture. Without it the latents' first three channels are shown.",
                ),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Own pictures that the LoRA was not trained on: says also how near it has come to them.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt, for a turbo that is sampled at a cfg above 1."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="A row before, a row after, the figures beside."),
                io.Float.Output(display_name="score", tooltip="Retention, from 0 to 1; 1 for nothing lost."),
                io.String.Output(display_name="report", tooltip="All figures with their 95 % intervals."),
            ],
        )

    @classmethod
    def execute(cls, positive, **inputs) -> io.NodeOutput:
        given = first_of_each(inputs)
        given["latent"] = given.pop("latent_image")
        figures, drawn = measure_retention(given.pop("before"), given.pop("after"), positive, **given)
        text = in_text(figures)
        said = show_text(cls, text).as_dict()
        score = figures["retention"].value
        show_picture(drawn)
        image = as_image(drawn)
        return io.NodeOutput(image, score, text, ui={**ui.PreviewImage(image, cls=cls).as_dict(), **said})


NODES = [TurboRetention]
