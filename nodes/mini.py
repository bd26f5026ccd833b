"""Load Mini Model and Mini Conditioning: the model shipped with the pack, so that everything runs with no download."""

from __future__ import annotations

import comfy.sd
import comfy.utils
from comfy_api.latest import io

from ..distill_core.models.mini import ASSETS, CLASS_NAMES, load_conditioning
from .common import CATEGORY

EMPTY, ALL = "none", "all ten"


def asset(name: str) -> str:
    """The path of a shipped file. Raises ValueError if the installation lacks it."""
    path = ASSETS / name
    if not path.is_file():
        raise ValueError(
            f"{path.name} is missing from the pack's folder distill_core/assets/mini: install the pack again"
        )
    return str(path)


class LoadMiniModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillLoadMiniModel",
            display_name="Load Mini Model",
            category=CATEGORY,
            description="The shipped SD3-type model of 3.8 M parameters for pictures of clothes, 64 x 64 pixels, and "
            "its autoencoder. Runs on any CPU.",
            inputs=[
                io.Boolean.Input(
                    "distilled",
                    default=True,
                    tooltip="On: with the shipped LoRA that the demo distilled, for 1, 2 or 4 steps at cfg 1. Off: the "
                    "many-step teacher, for about 25 steps at cfg 1.5.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The student or the teacher, as chosen."),
                io.Vae.Output(display_name="vae", tooltip="For its latents: 16 channels, 8 x 8."),
            ],
        )

    @classmethod
    def execute(cls, distilled) -> io.NodeOutput:
        model = comfy.sd.load_diffusion_model(asset("transformer.safetensors"))
        if distilled:
            path = asset("student.safetensors")
            lora, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0, lora_metadata=metadata)
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(asset("autoencoder.safetensors")))
        vae.throw_exception_if_invalid()
        return io.NodeOutput(model, vae)


class MiniConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillMiniConditioning",
            display_name="Mini Conditioning",
            category=CATEGORY,
            description="Conditioning of the mini model: one of its ten classes, or a list of all.",
            inputs=[
                io.Combo.Input(
                    "class_name",
                    options=[*CLASS_NAMES, EMPTY, ALL],
                    default=CLASS_NAMES[-1],
                    tooltip="What to draw; none is the empty conditioning, the negative of the teacher. all ten gives "
                    "a list, for Teacher Latents.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", is_output_list=True)],
        )

    @classmethod
    def execute(cls, class_name) -> io.NodeOutput:
        asset("conditioning.safetensors")
        table, names = load_conditioning(), [*CLASS_NAMES, EMPTY]
        rows = range(len(CLASS_NAMES)) if class_name == ALL else [names.index(class_name)]
        parts = [(table["context"][row : row + 1], table["pooled"][row : row + 1]) for row in rows]
        return io.NodeOutput([[[context, {"pooled_output": pooled}]] for context, pooled in parts])


NODES = [LoadMiniModel, MiniConditioning]
