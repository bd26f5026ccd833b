"""Turbo Preset, Turbo Sampler and Turbo Sampler Select: turbo models at the noise levels they were trained at."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.diffusion.samplers import SAMPLERS
from ..distill_core.diffusion.schedules import DENOISE_MODES
from ..distill_core.presets.levels import DEFAULT_SIZE
from ..distill_core.presets.recipe import AUTO, make_recipe
from ..distill_core.presets.table import presets
from .common import CATEGORY, OF_PRESET, SEED_MAX
from .host.findings import warnings_of
from .host.ksampler import ksampler_settings
from .host.model import facts_of, guidance_of
from .host.sampling import host_sampler, is_empty_mask, is_video, sample_latent
from .host.text import show_text

# Names of turbo models and words for them, under which people look for what samples one.
TURBOS = ("lightning", "schnell", "lcm", "hyper", "z-image", "qwen", "flux", "dmd2", "few steps", "speed", "fast")


def preset_input(several: str = "it asks you to choose") -> io.Combo.Input:
    """several: what auto does where a family has several distillations."""
    return io.Combo.Input(
        "preset",
        options=[AUTO, *presets()],
        default=AUTO,
        tooltip="Which turbo model this is. auto reads what the turbo LoRA on it, or the checkpoint, says of itself, "
        f"or else goes by the model's family; if a family has several distillations, {several}.",
    )


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=100,
        tooltip="Number of sampling steps. 0 uses the preset's own number; others are accepted only if the model was "
        "made for them, or if they follow the same rule and are in use.",
    )


def denoise_inputs() -> list:
    return [
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Fraction of the noise levels to use, counted from the end. 1 starts from pure noise, k/N at the "
            "k-th last trained level, and other values between two levels. It is never rounded to whole steps.",
        ),
        io.Combo.Input(
            "denoise_mode",
            options=list(DENOISE_MODES),
            default="snap",
            tooltip="What to do if denoise is below 1. snap: start at that level, then use only trained levels, in "
            "fewer steps. respace: keep the number of steps and space the levels like the trained ones. noise_level: "
            "denoise is the share of noise to start with, so 0.6 keeps 40 % of the picture on every model.",
        ),
    ]


def size_inputs() -> list:
    tip = "of the image in pixels. It matters only for presets whose noise levels depend on it (FLUX.2, FLUX.1 dev)."
    shared = dict(default=DEFAULT_SIZE, min=16, max=16384, step=16, optional=True)
    return [io.Int.Input(name, tooltip=f"{name.capitalize()} {tip}", **shared) for name in ("width", "height")]


def override_inputs() -> list:
    """What replaces the preset's own sampler, cfg and noise levels."""
    return [
        io.Combo.Input(
            "sampler",
            options=[OF_PRESET, *SAMPLERS],
            default=OF_PRESET,
            tooltip="Sampler to use instead of the preset's. renoise is core's lcm, and ancestral its euler_ancestral.",
        ),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale. 0 uses the preset's, usually 1; any other value doubles the cost of a step.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="Negative prompt, used if cfg is not 1 or if a patch on the model asks for it, such as core's "
            "Normalized Attention Guidance. Most turbo models need none.",
        ),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="Noise levels to use instead of the preset's. They must end in 0."
        ),
    ]


class TurboPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillPreset",
            display_name="Turbo Preset",
            category=CATEGORY,
            description="The noise levels, sampler and cfg that a turbo model was trained for, with their source.",
            search_aliases=["turbo scheduler", "sigmas", *TURBOS],
            inputs=[
                io.Model.Input("model", tooltip="The turbo model. Its family decides which presets fit."),
                preset_input(),
                steps_input(),
                *denoise_inputs(),
                *size_inputs(),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels, ending in 0."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced."),
                io.Float.Output(display_name="cfg", tooltip="The guidance scale the model was made for."),
                io.String.Output(display_name="explanation", tooltip="What was chosen, and the source of each value."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, preset, steps, denoise, denoise_mode, width=DEFAULT_SIZE, height=DEFAULT_SIZE
    ) -> io.NodeOutput:
        choice = dict(steps=steps or None, denoise=denoise, mode=denoise_mode, width=width, height=height)
        facts = facts_of(model)
        recipe = make_recipe(facts, preset, **choice)
        sampler = host_sampler(recipe.sampler, recipe.sampler_options)
        warnings = warnings_of(model, facts, recipe.sigmas, recipe.cfg, preset, (height, width))
        explanation = recipe.explanation
        if "KSampler" not in explanation and (settings := ksampler_settings(model, recipe)):
            explanation += f"\n{settings}"
        said = show_text(cls, "\n".join([explanation, *warnings]))
        return io.NodeOutput(recipe.sigmas, sampler, recipe.cfg, explanation, ui=said)


class TurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSampler",
            display_name="Turbo Sampler",
            category=CATEGORY,
            description="Samples a turbo model at the noise levels it was trained for. Any image of a batch can be "
            "reproduced on its own.",
            search_aliases=["turbo ksampler", "few step sampler", *TURBOS],
            inputs=[
                io.Model.Input("model", tooltip="Turbo model, or a model with a turbo LoRA."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty latent, or an encoded image for denoise below 1. With a noise mask, only the masked "
                    "part changes.",
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
                    tooltip="Seed of the noise; each image also uses its index in the batch.",
                ),
                *override_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampled latent."),
                io.Latent.Output(display_name="denoised", tooltip="The network's prediction at the last noise level."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        *,
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
        facts = facts_of(model)
        recipe = make_recipe(
            facts,
            preset,
            steps=steps or None,
            denoise=denoise,
            mode=denoise_mode,
            sigmas=sigmas,
            sampler=None if sampler == OF_PRESET else sampler,
            cfg=cfg or None,
            width=width,
            height=height,
            video=is_video(samples),
        )
        size, guidance = (height, width), guidance_of(positive)
        warnings = warnings_of(model, facts, recipe.sigmas, recipe.cfg, preset, size, guidance, sigmas is not None)
        if is_empty_mask(latent_image):
            warnings.append("WARNING: the mask is empty, so nothing is sampled. Paint one in the mask editor")
        said = show_text(cls, "\n".join([recipe.explanation, *warnings]))
        sampled = sample_latent(model, positive, negative, latent=latent_image, recipe=recipe, seed=seed)
        return io.NodeOutput(*sampled, ui=said)


class TurboSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSamplerSelect",
            display_name="Turbo Sampler Select",
            category=CATEGORY,
            description="A few-step sampler for SamplerCustom and SamplerCustomAdvanced; each image has its own noise.",
            search_aliases=["tcd", "scm", "trigflow", "ancestral", *TURBOS],
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="renoise",
                    tooltip="renoise: predict the image, add fresh noise, repeat (LCM, LADD). euler: no added noise. "
                    "ancestral: SD-Turbo. tcd: TCD and Hyper-SD's unified LoRA. scm: TrigFlow (SANA-Sprint).",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Amount of fresh noise in ancestral, scm and tcd (0.3 is usual for tcd; use more with more "
                    "steps). 0 makes them Euler. No effect on renoise and euler.",
                ),
                io.Int.Input(
                    "first_item",
                    default=0,
                    min=0,
                    max=1 << 20,
                    optional=True,
                    tooltip="Index of the first image of the batch. Set it to i to reproduce image i on its own with "
                    "the same added noise.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler, eta, first_item=0) -> io.NodeOutput:
        options = {} if sampler in ("renoise", "euler") else {"eta": eta}
        return io.NodeOutput(host_sampler(sampler, options, first_item=first_item))


NODES = [TurboPreset, TurboSampler, TurboSamplerSelect]
