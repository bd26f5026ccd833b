"""Teacher Edits: what a model that edits makes of pairs of pictures, as the dataset of its student."""

from __future__ import annotations

from functools import partial

from comfy_api.latest import io

from ..distill_core.data.cache import CacheConfig
from ..distill_core.methods.defaults import MOST_STEPS
from .common import first_of_each, seed_input, setting_input
from .datasets import Dataset, DatasetNode, name_input
from .host.edits import make_edits
from .host.text import show_text


def strength_inputs(name: str, low: float, high: float, of: str) -> list:
    """The lowest and the highest guidance scale of what is drawn for each item."""
    limits, drawn = dict(min=0.0, max=100.0, step=0.1), "Drawn evenly for each edit, from low to high."
    return [
        io.Float.Input(f"{name}_low", default=low, **limits, tooltip=f"{of} {drawn}"),
        io.Float.Input(f"{name}_high", default=high, **limits, tooltip=f"{drawn} The same twice is one for all."),
    ]


class TeacherEdits(DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "TeacherEdits",
            "Teacher Edits",
            "Lets a model that edits pictures edit the sources of a dataset by its texts, with its usual steps and "
            "guidance of text and picture, and stores the results as the dataset that a student is trained on. The "
            "strengths are drawn for each edit and stored with it. Resumes where it was stopped.",
            aliases=["instructpix2pix", "edit dataset", "dual cfg", "distillation dataset", "synthetic data"],
            inputs=[
                io.Model.Input("model", tooltip="Teacher: the many-step model that edits, including its LoRAs."),
                Dataset.Input("pairs", tooltip="Of Picture Folder with source_folder: sources and texts count."),
                name_input("my_edits"),
                io.Int.Input(
                    "count",
                    default=2000,
                    min=1,
                    max=1 << 20,
                    tooltip="Number of edits; the pairs come in turn, with other noise and strengths each time.",
                ),
                setting_input(io.Int, CacheConfig, "steps", default=25),
                *strength_inputs(
                    "text_strength",
                    *(3.0, 10.0),
                    "How much the teacher is guided by the text; 1 for FLUX.1 Kontext, which is told its guidance.",
                ),
                *strength_inputs(
                    "image_strength",
                    *(1.0, 2.0),
                    "How much the teacher is guided by the picture; 1 for FLUX.1 Kontext and Qwen-Image-Edit.",
                ),
                io.Int.Input(
                    "pairs_for_steps",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    optional=True,
                    tooltip="N > 0: also store the states of the teacher's path at the noise levels of an N-step "
                    "student, for the trainers' pairs loss. It makes few-step students much better and takes N + 1 "
                    "times the disk space.",
                ),
                io.Int.Input(
                    "batch_size", default=16, min=1, max=1024, optional=True, tooltip="Number of edits made at once."
                ),
                seed_input("Seed of the noise and the strengths; item i uses (seed, i).", optional=True, advanced=True),
            ],
        )

    @classmethod
    def execute(cls, model, pairs, dataset_name, **inputs) -> io.NodeOutput:
        given = first_of_each(inputs)
        text, image = ((given.pop(f"{of}_low"), given.pop(f"{of}_high")) for of in ("text_strength", "image_strength"))
        given["say"] = partial(show_text, cls)
        made = make_edits(model[0], pairs[0], dataset_name[0], text=text, image=image, **given)
        return cls.made(dataset_name[0], made)


NODES = [TeacherEdits]
