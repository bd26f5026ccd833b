"""The model families: what is known of each as data, in one table whose keys the presets and written files use.

How the network of a family is called, and where its blocks are, is its *architecture*: `backends/diffusers.py` here,
``nodes/host/architectures.py`` in ComfyUI. A new family is a row here and, where none fits, an architecture there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class LatentSpace:
    """Latents of an autoencoder: (z - shift) * scale is what diffusion models see of its own z."""

    channels: int
    scale: float
    shift: float = 0.0


@dataclass(frozen=True)
class PromptEncoding:
    """How a diffusers pipeline is asked for a prompt: ``encode_prompt(prompt, device=..., **options)``.

    The text tokens are all that it returns, or the first part.  pooled: which part is the pooled text, None where none
    is.  method: by another name.
    """

    options: Mapping[str, object]
    pooled: int | None
    method: str = "encode_prompt"


PIPELINES: dict[str, PromptEncoding] = {
    "StableDiffusionPipeline": PromptEncoding(
        {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}, pooled=None
    ),
    "StableDiffusionXLPipeline": PromptEncoding({"do_classifier_free_guidance": False}, pooled=2),
    "StableDiffusion3Pipeline": PromptEncoding(
        {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}, pooled=2
    ),
    "FluxPipeline": PromptEncoding({"prompt_2": None}, pooled=1),
}
PIPELINES |= {  # inpainting models are saved as pipelines of their own
    name.replace("Pipeline", "InpaintPipeline"): PIPELINES[name]
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
}
PIPELINES |= dict.fromkeys(("FluxFillPipeline", "FluxKontextPipeline"), PIPELINES["FluxPipeline"])
PIPELINES |= {  # and so are those that edit
    "StableDiffusionInstructPix2PixPipeline": replace(PIPELINES["StableDiffusionPipeline"], method="_encode_prompt"),
    "StableDiffusionXLInstructPix2PixPipeline": PIPELINES["StableDiffusionXLPipeline"],
}


@dataclass(frozen=True)
class Family:
    """Models that share a network, an autoencoder and text encoders, so that a LoRA of one fits the others."""

    title: str
    all_turbo: bool = field(default=False, kw_only=True)  # whether every model of it is made for a few steps
    channels: int | None = None  # of the latents; None where it was not looked up
    space: LatentSpace | None = None  # where E-LatentLPIPS weights were published for it
    pipeline: str = ""  # diffusers' class, one of `PIPELINES`; only where it can be distilled headless
    network: str = ""  # diffusers' class of the network
    network_config: Mapping[str, object] = field(default_factory=dict)  # tells families of one network class apart
    host_models: tuple[str, ...] = ()  # ComfyUI's classes of the model's configuration (comfy/supported_models.py)
    host_network: str = ""  # name of the architecture in ComfyUI; only where it can be distilled there


def _stable_diffusion(title: str, context: int, host_model: str, scale: float, pipeline: str) -> Family:
    """The families with a UNet, told apart by the width of their text encoding."""
    width = {"cross_attention_dim": context}
    space = LatentSpace(4, scale)
    return Family(title, 4, space, pipeline, "UNet2DConditionModel", width, (host_model,), "UNetModel")


_FLUX_SPACE = LatentSpace(16, 0.3611, 0.1159)

FAMILIES: dict[str, Family] = {
    "sd15": _stable_diffusion("SD1.5", 768, "SD15", 0.18215, "StableDiffusionPipeline"),
    "sd21": _stable_diffusion("SD2", 1024, "SD20", 0.18215, "StableDiffusionPipeline"),
    "sdxl": _stable_diffusion("SDXL", 2048, "SDXL", 0.13025, "StableDiffusionXLPipeline"),
    "pixart": Family("PixArt", 4, host_models=("PixArtAlpha",)),
    "sd3": Family(
        title="SD3",
        channels=16,
        space=LatentSpace(16, 1.5305, 0.0609),
        pipeline="StableDiffusion3Pipeline",
        network="SD3Transformer2DModel",
        host_models=("SD3",),
        host_network="OpenAISignatureMMDITWrapper",
    ),
    "flux": Family(
        title="FLUX.1",
        channels=16,
        space=_FLUX_SPACE,
        pipeline="FluxPipeline",
        network="FluxTransformer2DModel",
        network_config={"guidance_embeds": True},
        host_models=("Flux",),
        host_network="Flux",
    ),
    "flux-schnell": Family(
        title="FLUX.1 schnell",
        all_turbo=True,
        channels=16,
        pipeline="FluxPipeline",
        network="FluxTransformer2DModel",
        network_config={"guidance_embeds": False},
        host_models=("FluxSchnell",),
        host_network="Flux",
    ),
    "flux2": Family("FLUX.2", 128, host_models=("Flux2",), host_network="Flux2"),
    "flux3": Family("FLUX 3"),
    "z-image": Family("Z-Image", 16, host_models=("ZImage",), host_network="NextDiT"),
    "qwen-image": Family("Qwen-Image", 16, host_models=("QwenImage",), host_network="QwenImageTransformer2DModel"),
    "wan": Family("Wan", 16, host_models=("WAN21_T2V",), host_network="WanModel"),
    "wan2.2-5b": Family("Wan 2.2 5B", 48, host_models=("WAN22_T2V",), host_network="WanModel"),
    "krea2": Family("Krea 2", 16, host_models=("Krea2",)),
    "boogu": Family("Boogu", 16, host_models=("Boogu",)),
    "ernie-image": Family("ERNIE-Image", 128, host_models=("ErnieImage",)),
    "lens": Family("Lens", 128, host_models=("Lens",)),
    "mage-flow": Family("MageFlow", 128, host_models=("MageFlow",)),
    "hidream": Family("HiDream-I1", 16, host_models=("HiDream",)),
    "ltx": Family("LTX-2", 128, host_models=("LTXAV",)),
    "minimax-h3": Family("MiniMax-H3", 32, host_models=("MiniMaxH3",)),
    "hidream-o1": Family("HiDream-O1", 3, host_models=("HiDreamO1",)),
    "hunyuan-video-1.5": Family("HunyuanVideo-1.5", 32, host_models=("HunyuanVideo15",)),
    "ace-step-1.5": Family("ACE-Step 1.5", 64, host_models=("ACEStep15",)),
    "stable-audio-3": Family("Stable Audio 3", host_models=("StableAudio3",)),
    "pid": Family("PiD", 3, host_models=("PiD",)),
    "anima": Family("Anima", 16, host_models=("Anima",)),
    "chroma": Family("Chroma", 16, host_models=("Chroma",)),
    "sana": Family("SANA", 32),
    "nitro-e": Family("Nitro-E", 32),
}
# Classes of the host that derive from one in the table but are another model.
OTHER_HOST_MODELS = ("ZImagePixelSpace", "ChromaRadiance")
FAMILY_OF_HOST_MODEL = {host_model: name for name, family in FAMILIES.items() for host_model in family.host_models}


def family_of_network(class_name: str, config: Mapping[str, object]) -> str | None:
    """The family of a diffusers network, by its class and configuration; None where these do not tell."""
    for name, family in FAMILIES.items():
        if family.network == class_name and all(config.get(k) == v for k, v in family.network_config.items()):
            return name
    return None


def family_of_host_model(class_names: Iterable[str]) -> str | None:
    """The family of ComfyUI's configuration class, given with its bases, nearest first; None if it has none."""
    for class_name in class_names:
        if class_name in OTHER_HOST_MODELS:
            return None
        if class_name in FAMILY_OF_HOST_MODEL:
            return FAMILY_OF_HOST_MODEL[class_name]
    return None


def take_the_same_loras(one: str, other: str) -> bool:
    """Whether LoRAs of one family fit the other: the same network, but for an input of guidance (FLUX.1 dev, schnell).

    Names that are in no table may be anything.
    """
    if one == other or one not in FAMILIES or other not in FAMILIES:
        return True
    a, b = FAMILIES[one], FAMILIES[other]
    differing = {key for key, _ in a.network_config.items() ^ b.network_config.items()}
    return bool(a.host_network) and a.host_network == b.host_network and differing <= {"guidance_embeds"}
