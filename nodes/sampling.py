"""Turbo Preset, Turbo Sampler and Turbo Sampler Select: turbo models at the noise levels they were trained at."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.diffusion.samplers import SAMPLERS
from ..distill_core.diffusion.schedules import DENOISE_MODES
from ..distill_core.presets.recipe import AUTO, make_recipe
from ..distill_core.presets.table import DEFAULT_SIZE, presets
from .common import CATEGORY, OF_PRESET, SEED_MAX
from .host.model import facts_of
from .host.sampling import host_sampler, is_video, sample_latent


def preset_input() -> io.Combo.Input:
    return io.Combo.Input(
        "preset",
        options=[AUTO, *presets()],
        default=AUTO,
        tooltip="The turbo model. auto reads what the checkpoint or the last LoRA says of itself, else goes by the "
        "model's family; where several distillations of a family exist it asks you to choose.",
    )


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=100,
        tooltip="Number of steps, one call of the network each. 0 takes the number the preset was made for; others are "
        "accepted only if the model was made for them.",
    )


def denoise_inputs() -> list:
    return [
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of the preset's noise levels that is used, from the end: 1 starts from pure noise, k/N "
            "starts at the k-th last trained level, values in between at the levels between. Never rounded.",
        ),
        io.Combo.Input(
            "denoise_mode",
            options=list(DENOISE_MODES),
            default="snap",
            tooltip="Below denoise 1. snap: start exactly, then only trained levels, so fewer steps. respace: keep the "
            "number of steps and space them like the trained ones.",
        ),
    ]


def size_inputs() -> list:
    tip = "of the picture in pixels; matters only for presets whose noise levels depend on it (FLUX.2, FLUX.1 dev)."
    return [
        io.Int.Input(name, default=DEFAULT_SIZE, min=16, max=16384, step=16, optional=True, tooltip=f"{name} {tip}")
        for name in ("width", "height")
    ]


class TurboPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillPreset",
            display_name="Turbo Preset",
            category=CATEGORY,
            description="The trained noise levels, sampler and cfg of a turbo model, with their source.",
            search_aliases=["turbo scheduler", "lightning", "schnell", "lcm", "few steps", "sigmas"],
            inputs=[
                io.Model.Input("model", tooltip="Its family decides which presets fit; its table gives the sigmas."),
                preset_input(),
                steps_input(),
                *denoise_inputs(),
                *size_inputs(),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels, ending in 0."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced."),
                io.Float.Output(display_name="cfg", tooltip="The guidance scale the model was made for."),
                io.String.Output(display_name="explanation", tooltip="What was chosen and who says so."),
            ],
        )

    @classmethod
    def execute(
        cls, model, preset, steps, denoise, denoise_mode, width=DEFAULT_SIZE, height=DEFAULT_SIZE
    ) -> io.NodeOutput:
        facts = facts_of(model)
        recipe = make_recipe(facts, preset, steps or None, denoise, denoise_mode, width=width, height=height)
        sampler = host_sampler(recipe.sampler, recipe.sampler_options)
        return io.NodeOutput(recipe.sigmas, sampler, recipe.cfg, recipe.explanation)


class TurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSampler",
            display_name="Turbo Sampler",
            category=CATEGORY,
            description="Sample a turbo model at its trained noise levels. Image i of a batch is the image made alone.",
            search_aliases=["turbo ksampler", "lightning sampler", "few step sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The turbo model, or a model with its turbo LoRA."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty, or an encoded image for denoise below 1. With a noise mask only that part changes.",
                ),
                preset_input(),
                steps_input(),
                *denoise_inputs(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_MAX,
                    control_after_generate=True,
                    tooltip="All noise of an image comes from this and its index in the batch.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[OF_PRESET, *SAMPLERS],
                    default=OF_PRESET,
                    tooltip="Another sampler than the preset's. renoise is core's lcm, ancestral its euler_ancestral.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale; 0 takes the preset's, mostly 1, which costs one call of it a step.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Used only if cfg is not 1; most turbo models have none."
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="Noise levels to use instead of the preset's. They must end in 0."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Latent.Output(display_name="denoised", tooltip="What the network made of the last noise level."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        preset,
        steps,
        denoise,
        denoise_mode,
        seed,
        sampler,
        cfg,
        negative=None,
        sigmas=None,
    ) -> io.NodeOutput:
        samples = latent_image["samples"]
        scale = model.get_model_object("latent_format").spacial_downscale_ratio
        height, width = (size * scale for size in samples.shape[-2:])
        recipe = make_recipe(
            facts_of(model),
            preset,
            steps or None,
            denoise,
            denoise_mode,
            sigmas,
            None if sampler == OF_PRESET else sampler,
            cfg or None,
            width,
            height,
            is_video(samples),
        )
        return io.NodeOutput(*sample_latent(model, positive, negative, latent_image, recipe, seed))


class TurboSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSamplerSelect",
            display_name="Turbo Sampler Select",
            category=CATEGORY,
            description="A few-step SAMPLER for SamplerCustom and SamplerCustomAdvanced, with noise per image.",
            search_aliases=["tcd", "lcm", "scm", "trigflow", "ancestral"],
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="renoise",
                    tooltip="renoise: predict, add fresh noise, repeat (LCM, LADD). euler: no noise. ancestral: "
                    "SD-Turbo. tcd: TCD, Hyper-SD's unified LoRA. scm: TrigFlow (SANA-Sprint).",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of fresh noise in ancestral, tcd (0.3 is usual, more with more steps) and scm; 0 "
                    "makes them Euler. No effect on renoise and euler.",
                ),
                io.Int.Input(
                    "first_item",
                    default=0,
                    min=0,
                    max=1 << 20,
                    optional=True,
                    tooltip="Index of the first image of the batch: set it to i to remake image i alone with the same "
                    "injected noise.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, sampler, eta, first_item=0) -> io.NodeOutput:
        options = {} if sampler in ("renoise", "euler") else {"eta": eta}
        return io.NodeOutput(host_sampler(sampler, options, first_item=first_item))


NODES = [TurboPreset, TurboSampler, TurboSamplerSelect]
