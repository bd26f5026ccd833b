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


def inpainting(
    name: str, source: tuple[dict, list, list, list], side: int, cfg: float, batch: int = 4, told: float = 0.0
) -> dict:
    """An inpainting model in one step, on own pictures with random masks; both fill a square of a picture.

    told: the guidance scale that the network is told as an input, 0 for none.
    """
    loaders, model, clip, vae = source
    hole, corner = 3 * side // 8, 5 * side // 16
    data = dict(folder=EXAMPLES, dataset_name=name, size=side, masks="random", masks_each=4, embedded_guidance=told)
    trainer = dict(target_steps=1, steps=5000, batch_size=batch, accumulation=16 // batch, pairs_weight=0.0)
    real = dict(distillation_weight=2.5, teacher_cfg=cfg)
    given = dict(latent_image=link("inpainting", 2), seed=link("seed"), denoise=1.0, denoise_mode="snap", preset="auto")
    given |= dict(positive=link("inpainting"), steps=0)
    guided = dict(negative=link("inpainting", 1), sigmas=link("levels"), sampler="euler", cfg=real["teacher_cfg"])
    workflow = {
        **loaders,
        "compared": node("CLIPTextEncode", text=COMPARED, clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        "dataset": node("TurboDistillPictureFolder", model=model, vae=vae, clip=clip, **data),
        "train": node(
            "TurboDistillLADDTrainer", model=model, dataset=link("dataset"), run_name=name, vae=vae, **trainer, **real
        ),
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
        "image": node("LoadImage", image="example.png"),
        "small": node(
            "ImageScale", image=link("image"), upscale_method="lanczos", width=side, height=side, crop="center"
        ),
        "keep": node("SolidMask", value=0.0, width=side, height=side),
        "square": node("SolidMask", value=1.0, width=hole, height=hole),
        "mask": node(
            "MaskComposite", destination=link("keep"), source=link("square"), x=corner, y=corner, operation="add"
        ),
        "inpainting": node(
            "InpaintModelConditioning",
            positive=link("guided compared" if told else "compared"),
            negative=link("negative"),
            vae=vae,
            pixels=link("small"),
            mask=link("mask"),
            noise_mask=True,
        ),
        "seed": node("PrimitiveInt", value=7),
        "levels": node("BasicScheduler", model=model, scheduler="simple", steps=25, denoise=1.0),
        "teacher": node("TurboDistillSampler", model=model, **given, **guided),
        "student": node("TurboDistillSampler", model=link("train"), **given, sampler="of the preset", cfg=0.0),
    }
    if told:
        workflow["guided compared"] = node("FluxGuidance", conditioning=link("compared"), guidance=told)
    for who in ("teacher", "student"):
        workflow |= {
            f"decode {who}": node("VAEDecode", samples=link(who), vae=vae),
            f"paste {who}": node(
                "ImageCompositeMasked",
                destination=link("small"),
                source=link(f"decode {who}"),
                mask=link("mask"),
                x=0,
                y=0,
                resize_source=False,
            ),
            f"save {who}": node("SaveImage", images=link(f"paste {who}"), filename_prefix=f"{name}_{who}"),
        }
    return workflow


def sdxl_inpainting() -> dict:
    """The published file is a network alone; text encoders and VAE are those of SDXL."""
    loaders, _, clip, vae = checkpoint("sd_xl_base_1.0.safetensors")
    unet = node("UNETLoader", unet_name="sdxl_inpainting_0.1_fp16.safetensors", weight_dtype="default")
    return inpainting("distil_sdxl_inpainting", (loaders | {"unet": unet}, link("unet"), clip, vae), 1024, 5.0)


def flux_fill() -> dict:
    """FLUX.1 Fill is told its guidance, so the teacher runs at cfg 1."""
    source = parts("flux1-fill-dev.safetensors", FLUX_CLIP, "ae.safetensors")
    return inpainting("distil_flux1_fill", source, 1024, 1.0, 2, 30.0)


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
    "distil_sd15_inpainting": inpainting(
        "distil_sd15_inpainting", checkpoint("sd-v1-5-inpainting.safetensors"), 512, 5.0
    ),
    "distil_sdxl_inpainting": sdxl_inpainting(),
    "distil_flux1_fill": flux_fill(),
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
