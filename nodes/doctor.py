"""Schedule Doctor: what is wrong with a turbo model's noise levels, and the cure."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..distill_core.presets.doctor import diagnose
from .common import CATEGORY
from .host.model import facts_of, with_native_sampling
from .sampling import preset_input


class ScheduleDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = "of the picture in pixels, 0 if you do not know; only FLUX.2's noise levels depend on it."
        return io.Schema(
            node_id="TurboDistillDoctor",
            display_name="Schedule Doctor",
            category=CATEGORY,
            description="Compares a list of noise levels and what the network is told about them with what the model "
            "was trained on. Names each fault, says how to mend it, and gives the mended MODEL and SIGMAS.",
            search_aliases=["check sigmas", "shift", "scheduler", "wrong schedule", "debug"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="As it goes to the sampler, after all ModelSampling nodes."),
                io.Sigmas.Input("sigmas", tooltip="As they go to the sampler."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As set on the sampler."),
                preset_input(),
                io.Int.Input("width", default=0, min=0, max=16384, step=16, optional=True, tooltip=f"Width {tip}"),
                io.Int.Input("height", default=0, min=0, max=16384, step=16, optional=True, tooltip=f"Height {tip}"),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Model.Output(display_name="model", tooltip="With the sampling of its family where that was wrong."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The trained list, or the given one if none is known."),
            ],
        )

    @classmethod
    def execute(cls, model, sigmas, cfg, preset, width=0, height=0) -> io.NodeOutput:
        found = diagnose(facts_of(model), sigmas, cfg, preset, width or None, height or None)
        mended = with_native_sampling(model, found.shift_alpha) if found.restore_model else model
        return io.NodeOutput(found.report, mended, found.sigmas, ui=ui.PreviewText(found.report))


NODES = [ScheduleDoctor]
