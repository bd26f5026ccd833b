"""Load Mini Model and Mini Conditioning: the model shipped with the pack, so that all runs without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.models.mini import CLASS_NAMES, load_conditioning
from .common import CATEGORY
from .host.mini import asset, load_mini_model

EMPTY, ALL = "none", "all ten"


class LoadMiniModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillLoadMiniModel",
            display_name="Load Mini Model",
            category=CATEGORY,
            description="The shipped SD3-type model (3.8 M parameters, pictures of clothes, 64 x 64 pixels) and its "
            "autoencoder. Runs on any CPU.",
            inputs=[
                io.Boolean.Input(
                    "distilled",
                    default=True,
                    tooltip="On: the student, with the shipped LoRA, for 1, 2 or 4 steps at cfg 1. Off: the many-step "
                    "teacher, for about 25 steps at cfg 1.5.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The student or the teacher."),
                io.Vae.Output(display_name="vae", tooltip="Autoencoder for its latents (16 channels, 8 x 8)."),
                io.Clip.Output(
                    display_name="clip", tooltip="Takes the names of its classes as prompts, for CLIP Text Encode."
                ),
            ],
        )

    @classmethod
    def execute(cls, distilled) -> io.NodeOutput:
        return io.NodeOutput(*load_mini_model(distilled))


class MiniConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillMiniConditioning",
            display_name="Mini Conditioning",
            category=CATEGORY,
            description="Conditioning of the mini model: one of its ten classes, or a list of all ten.",
            inputs=[
                io.Combo.Input(
                    "class_name",
                    options=[*CLASS_NAMES, EMPTY, ALL],
                    default=CLASS_NAMES[-1],
                    tooltip="Class of the picture. none is the empty conditioning, the teacher's negative; all ten is "
                    "a list of all classes, for Teacher Latents.",
                )
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", is_output_list=True, tooltip="One conditioning, or ten."
                )
            ],
        )

    @classmethod
    def execute(cls, class_name) -> io.NodeOutput:
        asset("conditioning.safetensors")
        table, names = load_conditioning(), [*CLASS_NAMES, EMPTY]
        rows = range(len(CLASS_NAMES)) if class_name == ALL else [names.index(class_name)]
        parts = [(table["context"][row : row + 1], table["pooled"][row : row + 1]) for row in rows]
        return io.NodeOutput([[[context, {"pooled_output": pooled}]] for context, pooled in parts])


NODES = [LoadMiniModel, MiniConditioning]
