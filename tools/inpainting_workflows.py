"""Workflows that distil models which fill a part of a picture, in API format; those on the scenes run anywhere."""

from __future__ import annotations

from distil_workflows import COMPARED, EXAMPLES
from mini_workflows import GUIDANCE, k_sampler
from workflow_nodes import FLUX_CLIP, checkpoint, link, node, parts

EDITED = "edited scenes (shipped)"
ON_SCENES = dict(size=64, step=16, dtype="float32")
SMALL = dict(target_steps=1, rank=32, gradient_checkpointing=False, renoise_mean=0.0, renoise_std=1.0)


def scenes_of(kind: str) -> tuple[dict, list, list, list]:
    """A scenes model that is shown a picture, as `checkpoint` has one. Its levels are not shifted."""
    loaders = {
        "scenes": node("TurboDistillLoadScenesModel", kind=kind),
        "shifted": node("ModelSamplingSD3", model=link("scenes"), shift=1.0),
    }
    return loaders, link("shifted"), link("scenes", 2), link("scenes", 1)


def photograph(side: int) -> dict:
    """Nodes that end in the IMAGE "picture", a square."""
    scaled = dict(upscale_method="lanczos", width=side, height=side, crop="center")
    return {
        "image": node("LoadImage", image="example.png"),
        "picture": node("ImageScale", image=link("image"), **scaled),
    }


def drawn(positive: str) -> dict:
    """Nodes that end in the IMAGE "picture": four scenes that the model of words draws. positive: the key of their
    text."""
    settings = dict(seed=7, steps=25, cfg=GUIDANCE)
    return {
        "words model": node("TurboDistillLoadScenesModel", kind="text"),
        "words shifted": node("ModelSamplingSD3", model=link("words model"), shift=1.0),
        "words latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=4),
        "draw": k_sampler("words shifted", latent_image=link("words latent"), positive=link(positive), **settings),
        "picture": node("VAEDecode", samples=link("draw"), vae=link("words model", 1)),
    }


def inpainting(
    name: str,
    source: tuple[dict, list, list, list],
    picture: dict,
    cfg: float,
    data: dict,
    trainer: dict,
    text: str = COMPARED,
    told: float = 0.0,
) -> dict:
    """An inpainting model in one step, on own pictures with random masks; both fill a square of a picture.

    picture: nodes that end in the IMAGE "picture", of ``data["size"]``.  told: the guidance scale that the network is
    told as an input, 0 for none.
    """
    loaders, model, clip, vae = source
    side = data["size"]
    hole, corner = 3 * side // 8, 5 * side // 16
    data = dict(dataset_name=name, masks="random", embedded_guidance=told) | data
    real = dict(pairs_weight=0.0, distillation_weight=2.5, teacher_cfg=cfg)
    given = dict(latent_image=link("inpainting", 2), seed=link("seed"), denoise=1.0, denoise_mode="snap", preset="auto")
    given |= dict(positive=link("inpainting"), steps=0)
    guided = dict(negative=link("inpainting", 1), sigmas=link("levels"), sampler="euler", cfg=cfg)
    workflow = {
        **loaders,
        "compared": node("CLIPTextEncode", text=text, clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        "dataset": node("TurboDistillPictureFolder", model=model, vae=vae, clip=clip, **data),
        "train": node(
            "TurboDistillLADDTrainer", model=model, dataset=link("dataset"), run_name=name, vae=vae, **real, **trainer
        ),
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
        **picture,
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
            pixels=link("picture"),
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
                destination=link("picture"),
                source=link(f"decode {who}"),
                mask=link("mask"),
                x=0,
                y=0,
                resize_source=False,
            ),
            f"save {who}": node("SaveImage", images=link(f"paste {who}"), filename_prefix=f"{name}_{who}"),
        }
    return workflow


def large_inpainting(
    name: str, source: tuple[dict, list, list, list], side: int, cfg: float, batch: int = 4, told: float = 0.0
) -> dict:
    """A start for a model of full size; a photograph is filled."""
    data = dict(folder=EXAMPLES, size=side, masks_each=4)
    trainer = dict(target_steps=1, steps=5000, batch_size=batch, accumulation=16 // batch)
    return inpainting(name, source, photograph(side), cfg, data, trainer, told=told)


def sdxl_inpainting() -> dict:
    """The published file is a network alone; text encoders and VAE are those of SDXL."""
    loaders, _, clip, vae = checkpoint("sd_xl_base_1.0.safetensors")
    unet = node("UNETLoader", unet_name="sdxl_inpainting_0.1_fp16.safetensors", weight_dtype="default")
    return large_inpainting("distil_sdxl_inpainting", (loaders | {"unet": unet}, link("unet"), clip, vae), 1024, 5.0)


def flux_fill() -> dict:
    """FLUX.1 Fill is told its guidance, so the teacher runs at cfg 1."""
    source = parts("flux1-fill-dev.safetensors", FLUX_CLIP, "ae.safetensors")
    return large_inpainting("distil_flux1_fill", source, 1024, 1.0, 2, 30.0)


def inpaint_scenes() -> dict:
    """The scenes inpainting model in one step, on the twelve shipped scenes with sixteen masks each."""
    data = dict(folder=EDITED, masks_each=16, **ON_SCENES)
    trainer = dict(steps=120, batch_size=16, student_lr=4e-4, discriminator_lr=4e-3, **SMALL)
    text = "striped yellow ring on cobbles"
    return inpainting("inpaint_scenes", scenes_of("inpainting"), drawn("compared"), GUIDANCE, data, trainer, text)


INPAINTING_WORKFLOWS = {
    "inpaint_scenes": inpaint_scenes(),
    "distil_sd15_inpainting": large_inpainting(
        "distil_sd15_inpainting", checkpoint("sd-v1-5-inpainting.safetensors"), 512, 5.0
    ),
    "distil_sdxl_inpainting": sdxl_inpainting(),
    "distil_flux1_fill": flux_fill(),
}
