"""Workflows that distil a model in the graph and sample teacher and student side by side, in API format."""

from __future__ import annotations

from workflow_nodes import FLUX_CLIP, SD3_CLIP, checkpoint, link, node, parts, perceptual

SHIPPED, EXAMPLES = "assorted (shipped)", "example pictures (shipped)"
COMPARED = "a lighthouse on a cliff at sunset, waves below, photograph"


def distil(
    name: str,
    source: tuple[dict, list, list, list],
    size: int,
    pairs: int = 0,
    teacher: dict | None = None,
    kind: str = "LADDTrainer",
    settings: dict | None = None,
    empty: str = "EmptyLatentImage",
    **trainer,
) -> dict:
    """Prompts -> Teacher Latents -> a trainer -> LoRA and report -> both sampled: a start for a model of any family."""
    loaders, model, clip, vae = source
    data = dict(count=4000, steps=25, cfg=5.0, batch_size=4) | (teacher or {})
    training = dict(target_steps=4, steps=4000, batch_size=4) | trainer
    prompts = {
        "prompts": node("TurboDistillPrompts", prompts="", file=SHIPPED),
        "positive": node("CLIPTextEncode", text=link("prompts"), clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        "compared": node("CLIPTextEncode", text=COMPARED, clip=clip),
    }
    texts = (link("positive"), link("negative"), link("compared"))
    latent = node(empty, width=size, height=size, batch_size=2)
    return {
        **loaders,
        **prompts,
        **training_nodes(name, model, texts, vae, f"{size}x{size}", pairs, data, training, kind, settings),
        **side_by_side(name, model, texts, vae, latent, data),
    }


def training_nodes(name, model, texts, vae, sizes, pairs, data, training, kind, settings=None) -> dict:
    """Teacher Latents -> a trainer -> Save Turbo LoRA and the report. texts: positives, negative, and one positive."""
    positive, negative, _ = texts
    made = {
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
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
    }
    if settings:
        made["settings"] = node("TurboDistillTrainingSettings", **settings)
        made["train"]["inputs"]["settings"] = link("settings")
    return made


def side_by_side(name, model, texts, vae, latent, data) -> dict:
    """Teacher and student from the same noise and prompt, each decoded and saved."""
    _, negative, positive = texts
    sampler = dict(latent_image=link("latent"), seed=link("seed"), denoise=1.0, denoise_mode="snap", preset="auto")
    teacher = node(
        "TurboDistillSampler",
        model=model,
        positive=positive,
        negative=negative,
        sigmas=link("levels"),
        steps=0,
        sampler="euler",
        cfg=data["cfg"],
        **sampler,
    )
    student = node(
        "TurboDistillSampler",
        model=link("train"),
        positive=positive,
        steps=0,
        sampler="of the preset",
        cfg=0.0,
        **sampler,
    )
    return {
        "latent": latent,
        "seed": node("PrimitiveInt", value=7),
        "levels": node("BasicScheduler", model=model, scheduler="simple", steps=data["steps"], denoise=1.0),
        "teacher": teacher,
        "student": student,
        **{f"decode {who}": node("VAEDecode", samples=link(who), vae=vae) for who in ("teacher", "student")},
        **{
            f"save {who}": node("SaveImage", images=link(f"decode {who}"), filename_prefix=f"{name}_{who}")
            for who in ("teacher", "student")
        },
    }


def on_mini(name: str, kind: str, pairs: int, settings: dict | None = None, **trainer) -> dict:
    """The mini model's teacher and a trainer; on a CPU in minutes."""
    data = dict(count=1024, steps=8, cfg=1.5, batch_size=128, dtype="float32")
    rates = dict(student_lr=6e-4, discriminator_lr=4e-3)
    training = dict(target_steps=4, rank=32, sampler="ancestral", gradient_checkpointing=False) | rates
    model, vae = link("shifted"), link("mini", 1)
    texts = (link("positive"), link("negative"), link("compared"))
    latent = node("EmptySD3LatentImage", width=64, height=64, batch_size=4)
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "shifted": node("ModelSamplingSD3", model=link("mini"), shift=1.0),
        "positive": node("TurboDistillMiniConditioning", class_name="all ten"),
        "negative": node("TurboDistillMiniConditioning", class_name="none"),
        "compared": node("TurboDistillMiniConditioning", class_name="ankle boot"),
        **training_nodes(name, model, texts, vae, "64x64", pairs, data, training | trainer, kind, settings),
        **side_by_side(name, model, texts, vae, latent, data | dict(steps=25)),
    }


def mini_ladd() -> dict:
    return on_mini("distil_mini_ladd", "LADDTrainer", 4, steps=160, batch_size=32, renoise_mean=0.0, renoise_std=1.0)


def mini_add() -> dict:
    """Decoding is what costs, so the heads take four updates on each decoded batch. Keeps LoRAs on the way."""
    return on_mini(
        "distil_mini_add",
        "ADDTrainer",
        0,
        dict(lr_schedule="linear", decay_from=0.7, snapshot_every=50),
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


def mini_dmd2() -> dict:
    """Distribution matching with DMD's pairs, without a discriminator."""
    return on_mini(
        "distil_mini_dmd2",
        "DMD2Trainer",
        4,
        steps=200,
        batch_size=32,
        adversarial_weight=0.0,
        fake_score_updates=1,
        fake_score_lr=1e-3,
    )


def own_pictures() -> dict:
    """A folder of pictures in place of the teacher's: the shipped examples, clothes in inverted grey."""
    workflow = on_mini(
        "own_pictures",
        "LADDTrainer",
        0,
        steps=300,
        batch_size=4,
        pairs_weight=0.0,
        student_lr=3e-4,
        discriminator_lr=2e-3,
        rank=16,
        renoise_mean=0.0,
        renoise_std=1.0,
    )
    workflow["dataset"] = node(
        "TurboDistillPictureFolder",
        model=link("shifted"),
        vae=link("mini", 1),
        clip=link("mini", 2),
        folder=EXAMPLES,
        dataset_name="own_pictures",
        size=64,
        step=16,
        dtype="float32",
    )
    return workflow


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
    """SD 1.5 in one step: pairs of 50 steps at cfg 8, as in the paper, and a Huber distance that needs no file."""
    return distil(
        "distil_sd1.5_diffusion2gan",
        checkpoint("v1-5-pruned-emaonly-fp16.safetensors"),
        512,
        1,
        dict(count=20000, steps=50, cfg=8.0),
        "Diffusion2GANTrainer",
        target_steps=1,
        steps=10000,
        batch_size=8,
    )


def flux_dev() -> dict:
    """FLUX.1 dev has its guidance as an input, so the teacher runs at cfg 1."""
    loaders, model, clip, vae = parts("flux1-dev.safetensors", FLUX_CLIP, "ae.safetensors")
    workflow = distil(
        "distil_flux1_dev",
        (loaders, model, clip, vae),
        1024,
        0,
        dict(cfg=1.0),
        empty="EmptySD3LatentImage",
        batch_size=2,
    )
    for text in ("positive", "compared"):
        told = f"guided {text}"
        for entry in workflow.values():
            entry["inputs"] |= {key: link(told) for key, given in entry["inputs"].items() if given == link(text)}
        workflow[told] = node("FluxGuidance", conditioning=link(text), guidance=3.5)
    for entry in workflow.values():
        entry["inputs"] = {key: given for key, given in entry["inputs"].items() if given != link("negative")}
    del workflow["negative"]
    return workflow


SD35M = checkpoint("sd3.5_medium.safetensors")
DISTIL_WORKFLOWS = {
    "distil_mini_ladd": mini_ladd(),
    "distil_mini_add": mini_add(),
    "distil_mini_diffusion2gan": mini_diffusion2gan(),
    "distil_mini_dmd2": mini_dmd2(),
    "own_pictures": own_pictures(),
    "distil_sdxl_add": sdxl_add(),
    "distil_sd1.5_diffusion2gan": sd15_diffusion2gan(),
    "distil_sdxl_fine_tune": distil(
        "distil_sdxl_fine_tune",
        checkpoint("my_sdxl_fine_tune.safetensors"),
        1024,
        teacher=dict(cfg=6.0),
        settings=dict(optimizer="adamw", lr_schedule="cosine", warmup_steps=100, snapshot_every=500),
    ),
    "distil_sd3.5_medium": distil(
        "distil_sd3.5_medium",
        (SD35M[0] | {"clip": SD3_CLIP}, SD35M[1], link("clip"), SD35M[3]),
        1024,
        empty="EmptySD3LatentImage",
    ),
    "distil_flux1_dev": flux_dev(),
}
