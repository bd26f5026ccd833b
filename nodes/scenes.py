"""Load Scenes Model and Scenes Conditioning: the shipped models that read words."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.models.scenes import GROUPS, GUIDANCE, MODELS, TEXT, caption, combinations
from .common import CATEGORY
from .host.scenes import load_scenes_model, scenes_conditioning


class LoadScenesModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillLoadScenesModel",
            display_name="Load Scenes Model",
            category=CATEGORY,
            description="The shipped many-step model of coloured objects on textured grounds (SD3-type, 4.5 M "
            f"parameters, 64 x 64 pixels), which reads words. Sample it with about 25 steps at cfg {GUIDANCE:g}.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(MODELS),
                    default=TEXT,
                    optional=True,
                    tooltip="text draws what the words say. inpainting fills what a mask hides, with "
                    "InpaintModelConditioning. editing changes a picture, with InstructPixToPixConditioning; its words "
                    "are those of the whole edited picture.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The many-step model, a teacher."),
                io.Vae.Output(display_name="vae", tooltip="Autoencoder for its latents (16 channels, 8 x 8)."),
                io.Clip.Output(display_name="clip", tooltip="Reads its words, for CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(cls, kind=TEXT) -> io.NodeOutput:
        return io.NodeOutput(*load_scenes_model(kind))


class ScenesConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillScenesConditioning",
            display_name="Scenes Conditioning",
            category=CATEGORY,
            description='Conditionings of the scenes model for prompts such as "striped yellow ring on cobbles".',
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="striped yellow ring on cobbles",
                    tooltip="One prompt per line, of the words "
                    + "; ".join(", ".join(group) for group in GROUPS.values())
                    + ". Words may be left out. Empty: the empty conditioning, the negative.",
                ),
                io.Boolean.Input(
                    "all_prompts",
                    default=False,
                    tooltip="On: one conditioning for every combination of words that the model was trained on, for "
                    "Teacher Latents, in place of the prompts.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", is_output_list=True, tooltip="One conditioning for each prompt."
                )
            ],
        )

    @classmethod
    def execute(cls, prompts, all_prompts) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()] or [""]
        if all_prompts:
            lines = [caption(words) for words in combinations().tolist()]
        return io.NodeOutput([scenes_conditioning(line) for line in lines])


NODES = [LoadScenesModel, ScenesConditioning]
