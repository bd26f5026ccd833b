"""Prompt List: the prompts of a dataset, from a text file or written into the node."""

from __future__ import annotations

from comfy_api.latest import io

from .common import CATEGORY
from .host.prompts import NO_FILE, SHIPPED, date_of, lines_of, text_files


class PromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillPrompts",
            display_name="Prompt List",
            category=CATEGORY,
            description="A list of prompts, one per line, from a text file or written here. Connect it to CLIP Text "
            "Encode, which then makes one conditioning per prompt, and that to Teacher Latents.",
            search_aliases=["text list", "prompts from lines", "prompts from file", "load prompts", "txt"],
            inputs=[
                io.String.Input(
                    "prompts", multiline=True, default="", tooltip="One prompt per line; empty lines are ignored."
                ),
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, SHIPPED, *text_files()],
                    default=NO_FILE,
                    optional=True,
                    tooltip="A text file with one prompt per line: the 124 prompts that come with the pack, or any "
                    ".txt in ComfyUI's input folder. Its prompts come before those written here.",
                ),
            ],
            outputs=[io.String.Output(display_name="prompts", is_output_list=True, tooltip="For CLIP Text Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, prompts, file=NO_FILE) -> float:
        """Changes when the file does."""
        return date_of(file)

    @classmethod
    def execute(cls, prompts, file=NO_FILE) -> io.NodeOutput:
        lines = [line.strip() for line in [*lines_of(file), *prompts.splitlines()]]
        lines = [line for line in lines if line]
        if not lines:
            raise ValueError("the list has no prompts: write one per line, or choose a file")
        return io.NodeOutput(lines)


NODES = [PromptList]
