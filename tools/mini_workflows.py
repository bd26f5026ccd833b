"""Workflows on the shipped mini model that sample and compare, in API format; they run anywhere."""

from __future__ import annotations

from workflow_nodes import link, node, perceptual, picture_of, turbo_sampler

GUIDANCE = 2.0  # of `distill_core.models.scenes`
SAVED_BY_DISTIL_MINI_LADD = "distil_mini_ladd_00001_.safetensors"


def mini_parts(distilled: bool) -> dict:
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=distilled),
        "positive": node("TurboDistillMiniConditioning", class_name="ankle boot"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=4),
    }


def k_sampler(model: str, sampler_name: str = "euler", **values) -> dict:
    """Core's KSampler with the workflow's positive, negative and latent, unless others are given."""
    given = {key: link(key) for key in ("positive", "negative")} | {"latent_image": link("latent")} | values
    return node("KSampler", model=link(model), sampler_name=sampler_name, scheduler="simple", denoise=1.0, **given)


def doctor() -> dict:
    """A node that breaks the model, and the doctor that mends it: both sampled from one seed."""
    broken = dict(sigmas=link("levels"), sampler="euler", cfg=1.0)
    mended = broken | dict(sigmas=link("doctor", 2))
    return mini_parts(distilled=False) | {
        "seed": node("PrimitiveInt", value=7),
        "broken": node("ModelSamplingAuraFlow", model=link("mini"), shift=1.73),
        "levels": node("BasicScheduler", model=link("broken"), scheduler="simple", steps=4, denoise=1.0),
        "doctor": node(
            "TurboDistillDoctor", model=link("broken"), sigmas=link("levels"), cfg=1.0, preset="auto", width=0, height=0
        ),
        "findings": node("PreviewAny", source=link("doctor")),
        **sampled_twice(
            "schedule_doctor",
            before=turbo_sampler(link("broken"), link("positive"), link("latent"), seed=link("seed"), **broken),
            after=turbo_sampler(link("doctor", 1), link("positive"), link("latent"), seed=link("seed"), **mended),
        ),
    }


def sampled_twice(name: str, **samplers: dict) -> dict:
    """Two samplers and what they make, decoded and saved."""
    made = dict(samplers)
    for who in samplers:
        made[f"decode {who}"] = node("VAEDecode", samples=link(who), vae=link("mini", 1))
        made[f"save {who}"] = node("SaveImage", images=link(f"decode {who}"), filename_prefix=f"{name}_{who}")
    return made


def mini() -> dict:
    """The shipped student at the four levels it was trained at; everything comes from the LoRA's metadata."""
    return mini_parts(distilled=True) | {
        "sampler": turbo_sampler(link("mini"), link("positive"), link("latent"), preset="auto"),
        **picture_of("sample_mini", link("sampler"), link("mini", 1)),
    }


def scenes() -> dict:
    """The scenes model draws what a few words say, with core's sampler."""
    words = "striped yellow ring on cobbles"
    return {
        "scenes": node("TurboDistillLoadScenesModel"),
        "shifted": node("ModelSamplingSD3", model=link("scenes"), shift=1.0),
        "positive": node("TurboDistillScenesConditioning", prompts=words, all_prompts=False),
        "negative": node("TurboDistillScenesConditioning", prompts="", all_prompts=False),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=4),
        "sampler": k_sampler("shifted", seed=7, steps=25, cfg=GUIDANCE),
        **picture_of("sample_scenes", link("sampler"), link("scenes", 1)),
    }


def seed_variety() -> dict:
    """One class from the same four noises, without and with Seed Variety."""
    return mini_parts(distilled=True) | {
        "seed": node("PrimitiveInt", value=7),
        "variety": node("TurboDistillSeedVariety", model=link("mini"), strength=1.0, aid="stronger noise"),
        **sampled_twice(
            "seed_variety",
            plain=turbo_sampler(link("mini"), link("positive"), link("latent"), steps=1, seed=link("seed")),
            varied=turbo_sampler(link("variety"), link("positive"), link("latent"), steps=1, seed=link("seed")),
        ),
    }


def compare_latents() -> dict:
    """The mini teacher at 2 and at 25 steps from the same noise: how far apart they look, and where."""
    parts = mini_parts(distilled=False) | {
        "seed": node("PrimitiveInt", value=7),
        "negative": node("TurboDistillMiniConditioning", class_name="none"),
        "perceptual": perceptual("mini model (shipped)", draws=8),
    }
    for name, steps in (("few", 2), ("many", 25)):
        parts[name] = k_sampler("mini", seed=link("seed"), steps=steps, cfg=1.5)
        parts[f"decode {name}"] = node("VAEDecode", samples=link(name), vae=link("mini", 1))
        parts[f"save {name}"] = node(
            "SaveImage", images=link(f"decode {name}"), filename_prefix=f"compare_latents_{name}"
        )
    return parts | {
        "distance": node(
            "TurboDistillPerceptualDistance",
            perceptual=link("perceptual"),
            samples=link("few"),
            reference=link("many"),
            seed=0,
        ),
        "numbers": node("PreviewAny", source=link("distance")),
        "save map": node("SaveImage", images=link("distance", 1), filename_prefix="compare_latents_map"),
    }


def lora_in_ksampler() -> dict:
    """The LoRA that distil_mini_ladd saved, in core's KSampler; Turbo Preset says with which settings."""
    preset = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", width=64, height=64)
    return mini_parts(distilled=False) | {
        "shifted": node("ModelSamplingSD3", model=link("mini"), shift=1.0),
        "lora file": node(
            "LoraLoaderModelOnly", model=link("shifted"), lora_name=SAVED_BY_DISTIL_MINI_LADD, strength_model=1.0
        ),
        "negative": node("TurboDistillMiniConditioning", class_name="none"),
        "preset": node("TurboDistillPreset", model=link("lora file"), **preset),
        "explanation": node("PreviewAny", source=link("preset", 3)),
        "sampler": k_sampler("lora file", seed=7, steps=4, cfg=1.0, sampler_name="euler_ancestral"),
        **picture_of("lora_in_ksampler", link("sampler"), link("mini", 1)),
    }


def compare_teacher_student() -> dict:
    """The mini model and its shipped student, at 1, 2 and 4 steps beside the teacher's 25."""
    return {
        "teacher": node("TurboDistillLoadMiniModel", distilled=False),
        "student": node("TurboDistillLoadMiniModel", distilled=True),
        "positive": node("TurboDistillMiniConditioning", class_name="all ten"),
        "negative": node("TurboDistillMiniConditioning", class_name="none"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "perceptual": perceptual("mini model (shipped)", draws=8),
        "compare": node(
            "TurboDistillCompare",
            teacher=link("teacher"),
            student=link("student"),
            vae=link("teacher", 1),
            positive=link("positive"),
            negative=link("negative"),
            latent_image=link("latent"),
            perceptual=link("perceptual"),
            teacher_cfg=1.5,
            seed=7,
        ),
        "save": node("SaveImage", images=link("compare"), filename_prefix="compare_teacher_student"),
    }


MINI_WORKFLOWS = {
    "compare_teacher_student": compare_teacher_student(),
    "lora_in_ksampler": lora_in_ksampler(),
    "sample_mini": mini(),
    "sample_scenes": scenes(),
    "schedule_doctor": doctor(),
    "seed_variety": seed_variety(),
    "compare_latents": compare_latents(),
}
