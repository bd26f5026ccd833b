"""What workflows in API format are made of: nodes, links, and the loaders of a model."""

from __future__ import annotations


def link(node: str, output: int = 0) -> list:
    return [node, output]


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def checkpoint(file: str) -> tuple[dict, list, list, list]:
    return {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=file)}, *(link("checkpoint", i) for i in range(3))


def parts(unet: str, clip: dict, vae: str) -> tuple[dict, list, list, list]:
    loaders = {
        "unet": node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "clip": clip,
        "vae": node("VAELoader", vae_name=vae),
    }
    return loaders, link("unet"), link("clip"), link("vae")


def with_lora(source: tuple[dict, list, list, list], file: str) -> tuple[dict, list, list, list]:
    loaders, model, clip, vae = source
    lora = node("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)
    return loaders | {"lora": lora}, link("lora"), clip, vae


def perceptual(weights: str, draws: int = 1) -> dict:
    return node("TurboDistillLoadPerceptual", weights=weights, transforms="bg", draws=draws, l1=0.0)


def turbo_sampler(model: list, positive: list, latent: list, **inputs) -> dict:
    """Turbo Sampler with its defaults."""
    values = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=7, sampler="of the preset", cfg=0.0)
    return node("TurboDistillSampler", model=model, positive=positive, latent_image=latent, **(values | inputs))


def picture_of(name: str, latent: list, vae: list) -> dict:
    """Decoding and saving."""
    decode = node("VAEDecode", samples=latent, vae=vae)
    return {"decode": decode, "save": node("SaveImage", images=link("decode"), filename_prefix=name)}


FLUX_CLIP = node(
    "DualCLIPLoader", clip_name1="t5xxl_fp8_e4m3fn.safetensors", clip_name2="clip_l.safetensors", type="flux"
)
SD3_CLIP = node(
    "TripleCLIPLoader",
    clip_name1="clip_l.safetensors",
    clip_name2="clip_g.safetensors",
    clip_name3="t5xxl_fp8_e4m3fn.safetensors",
)
Z_CLIP = node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2")
QWEN_CLIP = node("CLIPLoader", clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image")
