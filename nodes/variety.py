"""Seed Variety: images of one prompt that differ more, on turbo models at cfg 1."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.diffusion.variety import check_strength
from .common import CATEGORY
from .host.variety import AIDS, with_variety


class SeedVariety(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSeedVariety",
            display_name="Seed Variety",
            category=CATEGORY,
            description="Makes the images of one prompt differ more from seed to seed. Turbo models at cfg 1 often "
            "make them too alike. Costs nothing: only the first step is changed.",
            search_aliases=["diversity", "seeds look alike", "same face", "variation", "cads", "mode collapse"],
            inputs=[
                io.Model.Input("model", tooltip="A turbo model, after its LoRAs."),
                io.Float.Input(
                    "strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 changes nothing. Too much costs the prompt: look at 0.5 first.",
                ),
                io.Combo.Input(
                    "aid",
                    options=list(AIDS),
                    default=AIDS[0],
                    tooltip="prompt noise: the prompt's embedding is noised in the first step (CADS). stronger noise: "
                    "the first step sees noise up to 10 % stronger; it does nothing in image to image.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model for the sampler. Works with any sampler.")
            ],
        )

    @classmethod
    def execute(cls, model, strength, aid) -> io.NodeOutput:
        check_strength(strength)
        return io.NodeOutput(with_variety(model, aid, strength) if strength else model)


NODES = [SeedVariety]
