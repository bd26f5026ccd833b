"""The shipped workflows in API format, {name: {node id: {class_type, inputs}}}; make_workflows.py makes the files.

The file names of models are those under which their publishers or ComfyUI's own examples offer them.
"""

from __future__ import annotations

from pathlib import Path

from distil_workflows import DISTIL_WORKFLOWS
from workflow_nodes import FLUX_CLIP, QWEN_CLIP, SD3_CLIP, Z_CLIP, checkpoint, link, node, parts, perceptual, with_lora

PROMPT = "a red fox in fresh snow, morning light, photograph"


def turbo_sampler(model: list, positive: list, latent: list, **inputs) -> dict:
    """Turbo Sampler with its defaults."""
    values = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=7, sampler="of the preset", cfg=0.0)
    return node("TurboDistillSampler", model=model, positive=positive, latent_image=latent, **(values | inputs))


def picture_of(name: str, latent: list, vae: list) -> dict:
    """Decoding and saving."""
    decode = node("VAEDecode", samples=latent, vae=vae)
    return {"decode": decode, "save": node("SaveImage", images=link("decode"), filename_prefix=name)}


def text_to_image(name: str, loaders: dict, model: list, clip: list, vae: list, latent: dict, **sampling) -> dict:
    """Loaders -> prompt -> Turbo Sampler -> picture."""
    return loaders | {
        "prompt": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "latent": latent,
        "sampler": turbo_sampler(model, link("prompt"), link("latent"), **sampling),
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
        positive=link("prompt"),
        negative=link("nothing"),
        sampler=link("preset", 1),
        sigmas=link("preset"),
        latent_image=link("latent"),
    )
    return loaders | {
        "prompt": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "nothing": node("ConditioningZeroOut", conditioning=link("prompt")),
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
        "prompt": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "sampler": turbo_sampler(
            model, link("prompt"), link("latent"), preset="sdxl-turbo-trailing", steps=4, denoise=0.5
        ),
        **picture_of("image_to_image_2_steps", link("sampler"), vae),
    }


def inpainting() -> dict:
    """The mask of the loaded image (its alpha, or what the mask editor painted), four steps."""
    loaders, model, clip, vae = dmd2()
    return loaders | {
        "image": node("LoadImage", image="example.png"),
        "encoded": node("VAEEncode", pixels=link("image"), vae=vae),
        "latent": node("SetLatentNoiseMask", samples=link("encoded"), mask=link("image", 1)),
        "prompt": node("CLIPTextEncode", text=PROMPT, clip=clip),
        "sampler": turbo_sampler(
            model, link("prompt"), link("latent"), preset="dmd2-sdxl", denoise=0.9, denoise_mode="respace"
        ),
        **picture_of("inpainting_4_steps", link("sampler"), vae),
    }


def mini_parts(distilled: bool) -> dict:
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=distilled),
        "class": node("TurboDistillMiniConditioning", class_name="ankle boot"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=4),
    }


def doctor() -> dict:
    """On the mini model, so that it runs anywhere: a node that breaks the model, and the doctor that mends it."""
    return mini_parts(distilled=False) | {
        "broken": node("ModelSamplingAuraFlow", model=link("mini"), shift=1.73),
        "levels": node("BasicScheduler", model=link("broken"), scheduler="simple", steps=4, denoise=1.0),
        "doctor": node(
            "TurboDistillDoctor", model=link("broken"), sigmas=link("levels"), cfg=1.0, preset="auto", width=0, height=0
        ),
        "report": node("PreviewAny", source=link("doctor")),
        "sampler": turbo_sampler(
            link("doctor", 1), link("class"), link("latent"), sigmas=link("doctor", 2), sampler="euler", cfg=1.0
        ),
        **picture_of("schedule_doctor", link("sampler"), link("mini", 1)),
    }


def mini() -> dict:
    """The shipped student at the four levels it was trained at; everything comes from the LoRA's metadata."""
    return mini_parts(distilled=True) | {
        "sampler": turbo_sampler(link("mini"), link("class"), link("latent"), preset="auto"),
        **picture_of("sample_mini", link("sampler"), link("mini", 1)),
    }


def compare_latents() -> dict:
    """The mini teacher at 2 and at 25 steps from the same noise: how far apart they look, and where."""
    parts = mini_parts(distilled=False) | {
        "seed": node("PrimitiveInt", value=7),
        "empty": node("TurboDistillMiniConditioning", class_name="none"),
        "perceptual": perceptual("mini model (shipped)", draws=8),
    }
    for name, steps in (("few", 2), ("many", 25)):
        parts[name] = node(
            "KSampler",
            model=link("mini"),
            seed=link("seed"),
            steps=steps,
            cfg=1.5,
            denoise=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=link("class"),
            negative=link("empty"),
            latent_image=link("latent"),
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
        "save": node("SaveImage", images=link("distance", 1), filename_prefix="compare_latents"),
    }


SD35 = checkpoint("sd3.5_large_turbo.safetensors")
QWEN = with_lora(
    parts("qwen_image_fp8_e4m3fn.safetensors", QWEN_CLIP, "qwen_image_vae.safetensors"),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors",
)
WORKFLOWS = {
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
    **DISTIL_WORKFLOWS,
    "schedule_doctor": doctor(),
    "sample_mini": mini(),
    "compare_latents": compare_latents(),
}
MODEL_FOLDERS = {
    "ckpt_name": "models/checkpoints",
    "unet_name": "models/diffusion_models",
    "lora_name": "models/loras",
    "vae_name": "models/vae",
    "clip_name": "models/text_encoders",
    "image": "input",
    "CLIPVisionLoader.clip_name": "models/clip_vision",
    "TurboDistillLoadPerceptual.weights": "models/perceptual",
}
TINY = ("taesd", "taesdxl", "taesd3", "taef1")  # VAEs that Load VAE makes of two files in models/vae_approx
RUNS_ANYWHERE = (
    "schedule_doctor",
    "sample_mini",
    "distil_mini_ladd",
    "distil_mini_add",
    "distil_mini_diffusion2gan",
    "compare_latents",
)


def files() -> set[str]:
    """The model and image files that the workflows name, relative to ComfyUI's base directory."""
    found = set()
    for workflow in WORKFLOWS.values():
        for entry in workflow.values():
            for key, value in entry["inputs"].items():
                key = key.rstrip("123")
                folder = MODEL_FOLDERS.get(f"{entry['class_type']}.{key}") or MODEL_FOLDERS.get(key)
                if value in TINY:
                    found |= {f"models/vae_approx/{value}_{part}.safetensors" for part in ("encoder", "decoder")}
                elif folder and isinstance(value, str) and "." in value:
                    found.add(f"{folder}/{value}")
    return found


def add_placeholders(base_dir: Path) -> None:
    """Empty files of these names, so that the frontend does not mark the loaders as lacking theirs."""
    for name in files():
        (base_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / name).touch()
