"""Schedule Doctor: what is wrong with a turbo model's noise levels, and the cure."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..distill_core.presets.doctor import diagnose
from .common import CATEGORY
from .host.model import facts_of, guidance_of, with_native_sampling
from .sampling import preset_input


class ScheduleDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = "of the image in pixels, 0 if unknown. Only the noise levels of FLUX models depend on it."
        return io.Schema(
            node_id="TurboDistillDoctor",
            display_name="Schedule Doctor",
            category=CATEGORY,
            description="Diagnoses wrong noise levels, shift, timestep scale, step count or cfg by comparing them with "
            "what the model was trained on, and outputs a corrected MODEL and SIGMAS.",
            search_aliases=["check sigmas", "shift", "scheduler", "wrong schedule", "debug"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model as it goes to the sampler, after all ModelSampling nodes."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels as they go to the sampler."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="The guidance scale set on the sampler."
                ),
                preset_input("it compares with the nearest list"),
                io.Int.Input("width", default=0, min=0, max=16384, step=16, optional=True, tooltip=f"Width {tip}"),
                io.Int.Input("height", default=0, min=0, max=16384, step=16, optional=True, tooltip=f"Height {tip}"),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt as it goes to the sampler, to examine its embedded guidance (FluxGuidance).",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Each fault, and how to correct it."),
                io.Model.Output(
                    display_name="model", tooltip="The model, with the sampling of its family restored if it was wrong."
                ),
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="The trained noise levels between the first and the last of the given list, or the given "
                    "ones if none are known.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, sigmas, cfg, preset, width=0, height=0, positive=None) -> io.NodeOutput:
        guidance = guidance_of(positive) if positive is not None else None
        found = diagnose(facts_of(model), sigmas, cfg, preset, width or None, height or None, guidance)
        shifts = found.shift_alpha, found.audio_shift
        corrected = with_native_sampling(model, *shifts) if found.restore_model else model
        return io.NodeOutput(found.report, corrected, found.sigmas, ui=ui.PreviewText(found.report))


NODES = [ScheduleDoctor]
