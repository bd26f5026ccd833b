"""Workflows that distil a model in the graph, in API format."""

from __future__ import annotations

from workflow_nodes import FLUX_CLIP, SD3_CLIP, checkpoint, link, node, parts, perceptual

PROMPTS = "\n".join(
    f"{subject}, {style}"
    for style in ("photograph, natural light", "oil painting", "detailed illustration")
    for subject in ("a red fox in fresh snow", "an old harbour at dawn", "a bowl of ramen", "a portrait of a violinist")
)


def distil(
    name: str,
    source: tuple[dict, list, list, list],
    size: int,
    pairs: int = 0,
    teacher: dict | None = None,
    kind: str = "LADDTrainer",
    **trainer,
) -> dict:
    """Prompts -> Teacher Latents -> a trainer -> Save Turbo LoRA and report: a start for a model of any family."""
    loaders, model, clip, vae = source
    return loaders | {
        "prompts": node("TurboDistillPrompts", prompts=PROMPTS),
        "positive": node("CLIPTextEncode", text=link("prompts"), clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        **trainer_nodes(
            name, model, link("positive"), link("negative"), vae, f"{size}x{size}", pairs, teacher, trainer, kind
        ),
    }


def trainer_nodes(name, model, positive, negative, vae, sizes, pairs, teacher, trainer, kind="LADDTrainer") -> dict:
    data = dict(count=4000, steps=25, cfg=5.0, batch_size=4) | (teacher or {})
    training = dict(target_steps=4, steps=4000, batch_size=4) | trainer
    return {
        "dataset": node(
            "TurboDistillTeacherLatents",
            model=model,
            positive=positive,
            negative=negative,
            dataset_name=name,
            sizes=sizes,
            pairs_for_steps=pairs,
            **data,
        ),
        "train": node(
            f"TurboDistill{kind}",
            model=model,
            dataset=link("dataset"),
            run_name=name,
            vae=vae,
            preview_positive=positive,
            preview_negative=negative,
            **training,
        ),
        "save": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=name),
    }


def on_mini(name: str, kind: str, pairs: int, **trainer) -> dict:
    """The mini model's teacher and a trainer; on a CPU in minutes."""
    teacher = dict(count=1024, steps=8, cfg=1.5, batch_size=128, dtype="float32")
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "teacher": node("ModelSamplingSD3", model=link("mini"), shift=1.0),
        "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
        "none": node("TurboDistillMiniConditioning", class_name="none"),
        **trainer_nodes(
            name,
            link("teacher"),
            link("classes"),
            link("none"),
            link("mini", 1),
            "64x64",
            pairs,
            teacher,
            dict(student_lr=6e-4, discriminator_lr=4e-3, rank=32, sampler="ancestral", gradient_checkpointing=False)
            | trainer,
            kind,
        ),
    }


def mini_ladd() -> dict:
    return on_mini("distil_mini_ladd", "LADDTrainer", 4, steps=160, batch_size=32, renoise_mean=0.0, renoise_std=1.0)


def mini_add() -> dict:
    """Decoding is what costs, so the heads take four updates on each decoded batch."""
    return on_mini(
        "distil_mini_add",
        "ADDTrainer",
        0,
        steps=100,
        batch_size=16,
        student_lr=2.5e-4,
        discriminator_lr=1e-2,
        discriminator_updates=4,
        vision_size=32,
        r1=0.05,
    )


def mini_diffusion2gan() -> dict:
    """One step, by E-LatentLPIPS on the mini model's latents and the critic on the shared backbone."""
    return on_mini(
        "distil_mini_diffusion2gan",
        "Diffusion2GANTrainer",
        1,
        target_steps=1,
        steps=80,
        batch_size=32,
        perceptual=link("perceptual"),
    ) | {"perceptual": perceptual("mini model (shipped)")}


def sdxl_add() -> dict:
    """As SDXL-Turbo was made, at 512 px: DINOv2 looks at what a tiny autoencoder decodes."""
    extras = {
        "tiny": node("VAELoader", vae_name="taesdxl"),
        "vision": node("CLIPVisionLoader", clip_name="dinov2_large.safetensors"),
    }
    loaders, model, clip, _ = checkpoint("sd_xl_base_1.0.safetensors")
    return distil(
        "distil_sdxl_add",
        (loaders | extras, model, clip, link("tiny")),
        512,
        teacher=dict(cfg=6.0),
        kind="ADDTrainer",
        clip_vision=link("vision"),
    )


def sd15_diffusion2gan() -> dict:
    """SD 1.5 in one step, as in the paper: pairs of 50 steps at cfg 8, E-LatentLPIPS."""
    loaders, model, clip, vae = checkpoint("v1-5-pruned-emaonly-fp16.safetensors")
    loaders["perceptual"] = perceptual("sd15.safetensors")
    return distil(
        "distil_sd1.5_diffusion2gan",
        (loaders, model, clip, vae),
        512,
        1,
        dict(count=20000, steps=50, cfg=8.0),
        "Diffusion2GANTrainer",
        target_steps=1,
        steps=10000,
        batch_size=8,
        perceptual=link("perceptual"),
    )


def flux_dev() -> dict:
    """FLUX.1 dev has its guidance as an input, so the teacher runs at cfg 1."""
    loaders, model, clip, vae = parts("flux1-dev.safetensors", FLUX_CLIP, "ae.safetensors")
    workflow = distil("distil_flux1_dev", (loaders, model, clip, vae), 1024, 0, dict(cfg=1.0), batch_size=2)
    workflow["guided"] = node("FluxGuidance", conditioning=link("positive"), guidance=3.5)
    workflow["dataset"]["inputs"]["positive"] = workflow["train"]["inputs"]["preview_positive"] = link("guided")
    for name, key in (("dataset", "negative"), ("train", "preview_negative")):
        del workflow[name]["inputs"][key]
    del workflow["negative"]
    return workflow


SD35M = checkpoint("sd3.5_medium.safetensors")
DISTIL_WORKFLOWS = {
    "distil_mini_ladd": mini_ladd(),
    "distil_mini_add": mini_add(),
    "distil_mini_diffusion2gan": mini_diffusion2gan(),
    "distil_sdxl_add": sdxl_add(),
    "distil_sd1.5_diffusion2gan": sd15_diffusion2gan(),
    "distil_sdxl_fine_tune": distil(
        "distil_sdxl_fine_tune", checkpoint("my_sdxl_fine_tune.safetensors"), 1024, teacher=dict(cfg=6.0)
    ),
    "distil_sd3.5_medium": distil(
        "distil_sd3.5_medium", (SD35M[0] | {"clip": SD3_CLIP}, SD35M[1], link("clip"), SD35M[3]), 1024
    ),
    "distil_flux1_dev": flux_dev(),
}
