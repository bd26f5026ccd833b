"""Editing Strengths: how closely a student that edits keeps to the text and to the picture."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY
from .host.strengths import with_strengths
from .host.text import show_text


def strength_input(name: str, of: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip=f"{of} Inside of the range that the student was trained at, which the node says. 0: the default of its "
        "file.",
    )


class EditingStrengths(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillEditingStrengths",
            display_name="Editing Strengths",
            category=CATEGORY,
            description="Sets how closely a few-step student that edits pictures keeps to the text and to the picture, "
            "as two guidance scales do with many steps. For LoRAs that were trained with strengths. Costs nothing.",
            search_aliases=["image strength", "text strength", "image cfg", "instructpix2pix", "dual cfg", "edit"],
            inputs=[
                io.Model.Input("model", tooltip="An editing model with the LoRA of such a student."),
                strength_input("text_strength", "Higher follows the text more."),
                strength_input("image_strength", "Higher stays nearer to the picture that is edited."),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model for the sampler, at cfg 1. Works with any sampler."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, text_strength, image_strength) -> io.NodeOutput:
        told, said = with_strengths(model, text_strength, image_strength)
        return io.NodeOutput(told, ui=show_text(cls, said))


NODES = [EditingStrengths]
