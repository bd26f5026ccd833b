"""Compare Models: the picture that everybody wants after a distillation."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from .common import CATEGORY, first_of_each, seed_input
from .host.compare import compare, grid_of
from .host.results import as_image
from .host.text import show_picture, show_text
from .perceptual import Perceptual
from .sampling import preset_input

MOST_COUNTS = 8


class CompareModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillCompare",
            display_name="Compare Models",
            category=CATEGORY,
            description="Lays teacher and student side by side: pictures from the same noise at several numbers of "
            "steps, seconds and forward passes beside them, and maps of where they differ from the teacher.",
            search_aliases=["compare teacher student", "before after", "side by side", "benchmark", "xy plot", "speed"],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[*model_inputs(), *choice_inputs()],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures, with their costs and differences."),
                io.String.Output(display_name="report", tooltip="The figures of each row, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, positive, steps, **inputs) -> io.NodeOutput:
        given = first_of_each(inputs)
        given["negative"] = given.pop("negative", None)
        given["prompts"], given["latent"] = positive, given.pop("latent_image")
        for rows in compare(**given, steps=step_counts(steps[0])):  # the last has all of them
            picture = grid_of(rows)
            show_picture(picture)
        report = {"seed": given["seed"], "rows": [row.figures(rows[0]) for row in rows]}
        image = as_image(picture)
        said = show_text(cls, "\n".join(sentence(figures) for figures in report["rows"]))
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **said.as_dict()}
        return io.NodeOutput(image, json.dumps(report, indent=1), ui=shown)


def model_inputs() -> list:
    """What is compared, and on what."""
    return [
        io.Model.Input("teacher", tooltip="The many-step model."),
        io.Model.Input("student", tooltip="The turbo model: a trainer's model output, or a model with a turbo LoRA."),
        io.Vae.Input("vae", tooltip="Decodes the pictures."),
        io.Conditioning.Input("positive", tooltip="One prompt, or a list: one column of the grid for each."),
        io.Latent.Input(
            "latent_image",
            tooltip="Empty latent of the size to compare at. With a single prompt its batch is the number of columns.",
        ),
        io.Conditioning.Input(
            "negative", optional=True, tooltip="Negative prompt of the teacher; needed unless teacher_cfg is 1."
        ),
        Perceptual.Input(
            "perceptual",
            optional=True,
            tooltip="Of Load E-LatentLPIPS: also say how far each row looks from the teacher's.",
        ),
    ]


def choice_inputs() -> list:
    """At what they are compared."""
    return [
        io.String.Input(
            "steps",
            default="1, 2, 4",
            tooltip="Numbers of steps at which both are sampled, separated by commas. The student takes those that it "
            "was trained for.",
        ),
        io.Int.Input(
            "teacher_steps",
            default=25,
            min=1,
            max=1000,
            tooltip="The teacher's usual steps: the first row, which all others are compared with.",
        ),
        io.Float.Input(
            "teacher_cfg",
            default=5.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="The teacher's guidance scale. Above 1 each of its steps costs two forward passes.",
        ),
        preset_input(),
        seed_input("Seed of the noise; column i uses (seed, i) in every row."),
    ]


def step_counts(text: str) -> list[int]:
    """ "1, 2, 4" as numbers. Raises ValueError for anything else, and for more than eight."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(parts) > MOST_COUNTS or not all(part.isdecimal() and 0 < int(part) <= 100 for part in parts):
        raise ValueError(
            f"steps: {text!r} is not a list of 1 to {MOST_COUNTS} numbers of steps; write them like 1, 2, 4"
        )
    return [int(part) for part in parts]


def sentence(figures: dict) -> str:
    """A row's figures in one line."""
    lpips = f", E-LatentLPIPS {figures['e_latent_lpips']:.4g}" if "e_latent_lpips" in figures else ""
    cost = f"{figures['seconds']:.3g} s and {figures['forwards']} forwards a picture"
    return (
        f"{figures['model']}, {figures['steps']} steps: {cost} ({figures['times_faster']} x as fast), difference "
        f"{figures['difference']:.4f}{lpips}"
    )


NODES = [CompareModels]
