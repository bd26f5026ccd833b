"""Workflows that sample published turbo models, in API format."""

from __future__ import annotations

from workflow_nodes import (
    FLUX_CLIP,
    QWEN_CLIP,
    SD3_CLIP,
    Z_CLIP,
    checkpoint,
    link,
    node,
    parts,
    picture_of,
    turbo_sampler,
    with_lora,
)

PROMPT = "a red fox in fresh snow, morning light, photograph"


def text_to_image(name: str, loaders: dict, model: list, clip: list, vae: list, latent: dict, **sampling) -> dict:
    """Loaders -> prompt -> Turbo Sampler -> picture."""
    return loaders | {
        "positive": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "latent": latent,
        "sampler": turbo_sampler(model, link("positive"), link("latent"), **sampling),
        **picture_of(name, link("sampler"), vae),
    }


def empty(side: int, class_type: str = "EmptyLatentImage") -> dict:
    return node(class_type, width=side, height=side, batch_size=1)


def sd3_empty(side: int) -> dict:
    return empty(side, "EmptySD3LatentImage")


def dmd2() -> tuple[dict, list, list, list]:
    return with_lora(checkpoint("sd_xl_base_1.0.safetensors"), "dmd2_sdxl_4step_lora_fp16.safetensors")


def sdxl_dmd2_lora() -> dict:
    """With core's SamplerCustom, to show how Turbo Preset feeds it."""
    loaders, model, clip, vae = dmd2()
    preset = node(
        "TurboDistillPreset",
        model=model,
        preset="dmd2-sdxl",
        steps=0,
        denoise=1.0,
        denoise_mode="snap",
        width=1024,
        height=1024,
    )
    custom = node(
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=7,
        cfg=link("preset", 2),
        positive=link("positive"),
        negative=link("nothing"),
        sampler=link("preset", 1),
        sigmas=link("preset"),
        latent_image=link("latent"),
    )
    return loaders | {
        "positive": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "nothing": node("ConditioningZeroOut", conditioning=link("positive")),
        "latent": empty(1024),
        "preset": preset,
        "explanation": node("PreviewAny", source=link("preset", 3)),
        "sampler": custom,
        **picture_of("sdxl_dmd2_lora", link("sampler"), vae),
    }


def image_to_image() -> dict:
    """Half of SDXL-Turbo's four levels: two steps."""
    loaders, model, clip, vae = checkpoint("sd_xl_turbo_1.0_fp16.safetensors")
    return loaders | {
        "image": node("LoadImage", image="example.png"),
        "small": node(
            "ImageScale", image=link("image"), upscale_method="lanczos", width=512, height=512, crop="center"
        ),
        "latent": node("VAEEncode", pixels=link("small"), vae=vae),
        "positive": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "sampler": turbo_sampler(
            model, link("positive"), link("latent"), preset="sdxl-turbo-trailing", steps=4, denoise=0.5
        ),
        **picture_of("image_to_image_2_steps", link("sampler"), vae),
    }


def inpainting() -> dict:
    """A soft square in the middle of the picture is made anew in four steps."""
    loaders, model, clip, vae = dmd2()
    side, hole, soft = 1024, 512, 64
    return loaders | {
        "image": node("LoadImage", image="example.png"),
        "large": node(
            "ImageScale", image=link("image"), upscale_method="lanczos", width=side, height=side, crop="center"
        ),
        "encoded": node("VAEEncode", pixels=link("large"), vae=vae),
        "keep": node("SolidMask", value=0.0, width=side, height=side),
        "square": node("SolidMask", value=1.0, width=hole, height=hole),
        "soft square": node("FeatherMask", mask=link("square"), left=soft, top=soft, right=soft, bottom=soft),
        "mask": node(
            "MaskComposite", destination=link("keep"), source=link("soft square"), x=256, y=256, operation="add"
        ),
        "shown mask": node("MaskPreview", mask=link("mask")),
        "latent": node("SetLatentNoiseMask", samples=link("encoded"), mask=link("mask")),
        "positive": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "sampler": turbo_sampler(
            model, link("positive"), link("latent"), preset="dmd2-sdxl", denoise=0.9, denoise_mode="respace"
        ),
        **picture_of("inpainting_4_steps", link("sampler"), vae),
    }


SD35 = checkpoint("sd3.5_large_turbo.safetensors")
QWEN = with_lora(
    parts("qwen_image_fp8_e4m3fn.safetensors", QWEN_CLIP, "qwen_image_vae.safetensors"),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors",
)
SAMPLING_WORKFLOWS = {
    "sdxl_turbo": text_to_image(
        "sdxl_turbo", *checkpoint("sd_xl_turbo_1.0_fp16.safetensors"), empty(512), preset="sdxl-turbo", steps=1
    ),
    "sd_turbo": text_to_image(
        "sd_turbo", *checkpoint("sd_turbo.safetensors"), empty(512), preset="sdxl-turbo", steps=2
    ),
    "flux1_schnell": text_to_image(
        "flux1_schnell", *parts("flux1-schnell.safetensors", FLUX_CLIP, "ae.safetensors"), sd3_empty(1024), steps=4
    ),
    "sd3.5_large_turbo": text_to_image(
        "sd3.5_large_turbo", SD35[0] | {"clip": SD3_CLIP}, SD35[1], link("clip"), SD35[3], sd3_empty(1024)
    ),
    "z_image_turbo": text_to_image(
        "z_image_turbo", *parts("z_image_turbo_bf16.safetensors", Z_CLIP, "ae.safetensors"), sd3_empty(1024)
    ),
    "qwen_image_lightning": text_to_image(
        "qwen_image_lightning", *QWEN, sd3_empty(1328), preset="qwen-image-lightning-4"
    ),
    "sdxl_dmd2_lora": sdxl_dmd2_lora(),
    "image_to_image_2_steps": image_to_image(),
    "inpainting_4_steps": inpainting(),
}
