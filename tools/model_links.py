"""Where the model files of the workflows come from, for ComfyUI's panel of missing models.

The addresses are those of ComfyUI's own templates and of the publishers. Models of Stability AI and Black Forest Labs
ask for a login and their licence.
"""

from __future__ import annotations

HUB = "https://huggingface.co"
LINKS = {  # file name: (folder under models/, address)
    "sd_xl_base_1.0.safetensors": (
        "checkpoints",
        f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    ),
    "sd_xl_turbo_1.0_fp16.safetensors": (
        "checkpoints",
        f"{HUB}/stabilityai/sdxl-turbo/resolve/main/sd_xl_turbo_1.0_fp16.safetensors",
    ),
    "sd_turbo.safetensors": ("checkpoints", f"{HUB}/stabilityai/sd-turbo/resolve/main/sd_turbo.safetensors"),
    "v1-5-pruned-emaonly-fp16.safetensors": (
        "checkpoints",
        f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    ),
    "sd-v1-5-inpainting.safetensors": (
        "checkpoints",
        f"{HUB}/webui/stable-diffusion-inpainting/resolve/main/sd-v1-5-inpainting.safetensors",
    ),
    "sdxl_inpainting_0.1_fp16.safetensors": (
        "diffusion_models",
        f"{HUB}/diffusers/stable-diffusion-xl-1.0-inpainting-0.1/resolve/main/unet/"
        "diffusion_pytorch_model.fp16.safetensors",
    ),
    "sd3.5_medium.safetensors": (
        "checkpoints",
        f"{HUB}/stabilityai/stable-diffusion-3.5-medium/resolve/main/sd3.5_medium.safetensors",
    ),
    "sd3.5_large_turbo.safetensors": (
        "checkpoints",
        f"{HUB}/stabilityai/stable-diffusion-3.5-large-turbo/resolve/main/sd3.5_large_turbo.safetensors",
    ),
    "flux1-dev.safetensors": ("diffusion_models", f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    "flux1-fill-dev.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux1-dev/resolve/main/split_files/diffusion_models/flux1-fill-dev.safetensors",
    ),
    "flux1-dev-kontext_fp8_scaled.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
        "flux1-dev-kontext_fp8_scaled.safetensors",
    ),
    "flux1-schnell.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell.safetensors",
    ),
    "z_image_turbo_bf16.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/diffusion_models/z_image_turbo_bf16.safetensors",
    ),
    "qwen_image_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/diffusion_models/"
        "qwen_image_fp8_e4m3fn.safetensors",
    ),
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/"
        "qwen_image_edit_2509_fp8_e4m3fn.safetensors",
    ),
    "dmd2_sdxl_4step_lora_fp16.safetensors": (
        "loras",
        f"{HUB}/tianweiy/DMD2/resolve/main/dmd2_sdxl_4step_lora_fp16.safetensors",
    ),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors": (
        "loras",
        f"{HUB}/lightx2v/Qwen-Image-Lightning/resolve/main/Qwen-Image-Lightning-4steps-V1.0.safetensors",
    ),
    "clip_l.safetensors": ("text_encoders", f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"),
    "clip_g.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/text_encoders/clip_g.safetensors",
    ),
    "t5xxl_fp8_e4m3fn.safetensors": (
        "text_encoders",
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn.safetensors",
    ),
    "qwen_3_4b.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/"
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
    "ae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    ),
    "qwen_image_vae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/qwen_image_vae.safetensors",
    ),
    "dinov2_large.safetensors": ("clip_vision", f"{HUB}/facebook/dinov2-large/resolve/main/model.safetensors"),
}
TINY = {  # what Load VAE calls a tiny autoencoder: its files in models/vae_approx
    "taesdxl": [f"{HUB}/madebyollin/taesdxl/resolve/main/taesdxl_{part}.safetensors" for part in ("encoder", "decoder")]
}


def models_of(values: list) -> list[dict]:
    """The files that a node's widget values name, in the form of ``properties.models``."""
    named = [value for value in values if isinstance(value, str)]
    found = [(name, *LINKS[name]) for name in named if name in LINKS]
    found += [(url.rsplit("/", 1)[1], "vae_approx", url) for name in named for url in TINY.get(name, [])]
    return [{"name": name, "url": url, "directory": folder} for name, folder, url in found]
