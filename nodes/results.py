"""Save Turbo LoRA and Training Report: what a training run leaves behind."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .common import CATEGORY, first_of_each, seed_input
from .host.results import as_image, log_date, report, report_warnings, save_turbo_lora
from .host.text import show_text


class SaveTurboLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSaveLora",
            display_name="Save Turbo LoRA",
            category=CATEGORY,
            description="Saves a distilled LoRA together with its sampling settings, so that Turbo Sampler on auto "
            "takes its noise levels, sampler and cfg from the file. Core's LoRA loader and diffusers can read it. If "
            "the newest file of that name is the same, no other is written.",
            search_aliases=["export lora", "save lora"],
            is_output_node=True,
            inputs=[
                io.Custom("LORA_MODEL").Input("lora", tooltip="The lora output of a trainer of this pack."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/turbo",
                    tooltip="Path and beginning of the file's name inside the output folder. LoRA loaders list files "
                    "under loras/.",
                ),
                io.Boolean.Input(
                    "merge_upstream",
                    default=False,
                    optional=True,
                    tooltip="If the model had LoRAs when the student was trained, write them into the same file, at "
                    "their strengths. Otherwise the student needs them loaded before it. Nothing else changes.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file's name as LoRA loaders list it.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, merge_upstream=False) -> io.NodeOutput:
        lora_name, path, same = save_turbo_lora(lora, filename_prefix, merge_upstream)
        text = f"{path} already holds this LoRA; nothing was written" if same else f"saved {path}"
        return io.NodeOutput(lora_name, ui=ui.PreviewText(text))


class TrainingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillReport",
            display_name="Training Report",
            category=CATEGORY,
            description="One picture of a training run, finished or stopped: its curves, how the discriminator is "
            "doing, and the teacher beside the student at 1 step, at the trained number of steps, and the teacher at "
            "its usual number.",
            search_aliases=["loss curve", "plot", "before after"],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "run_name", default="my_turbo", tooltip="Name of the run; connect a trainer's run_name."
                ),
                io.Model.Input("model", optional=True, tooltip="Teacher, for the before/after grid."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the images of the grid."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="One prompt or a list: one column of the grid per prompt."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="If connected, the teacher is guided as in the dataset; otherwise its cfg is 1.",
                ),
                seed_input("Seed of the grid's noise.", optional=True),
            ],
            outputs=[io.Image.Output(display_name="report", tooltip="The curves, with the before/after grid below.")],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, **inputs) -> float:
        return log_date(run_name[0] if run_name else "")

    @classmethod
    def execute(cls, positive=(), **inputs) -> io.NodeOutput:
        single = first_of_each(inputs)
        image = as_image(report(positive=positive, **single))
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        warnings = report_warnings(single["run_name"], single.get("model"))
        if warnings:
            shown |= show_text(cls, "\n".join(warnings)).as_dict()
        return io.NodeOutput(image, ui=shown)


NODES = [SaveTurboLora, TrainingReport]
