"""The workflows that are run at full size, and what is changed in them: files, sizes and counts, nothing else.

A text encoder is random numbers (TestRandomClip); the VAE is a tiny autoencoder under the name of the real one.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from distil_workflows import distil  # noqa: E402
from full_shapes import SHAPES  # noqa: E402
from workflow_nodes import Z_CLIP, link, node, parts, turbo_sampler  # noqa: E402

from workflows import WORKFLOWS  # noqa: E402

TRAINED_STEPS, TEACHER_STEPS = 2, 2
CLIP_LOADERS = ("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader")
PROMPTS = "a red fox in fresh snow\na lighthouse on a cliff"


class Row(NamedTuple):
    """A workflow in API format on a network of `full_shapes.SHAPES`. px: side of its pictures.  model: what was built,
    for the table."""

    name: str
    workflow: dict
    network: str
    px: int
    model: str


def shipped(name: str, network: str, px: int, model: str) -> Row:
    return Row(name, WORKFLOWS[name], network, px, model)


def general(network: str, px: int, model: str, empty: str = "EmptySD3LatentImage") -> Row:
    """The general graph of the distil_* workflows, for a family that has none of its own."""
    name = f"distil_{network}"
    source = parts(f"{network}.safetensors", Z_CLIP, "ae.safetensors")
    return Row(f"{name} (not shipped)", distil(name, source, px, empty=empty, batch_size=2), network, px, model)


ROWS = {
    "sd15": shipped("distil_sd1.5_diffusion2gan", "sd15", 64, "SD 1.5"),
    "sdxl": shipped("distil_sdxl_fine_tune", "sdxl", 64, "SDXL"),
    "sdxl add": shipped("distil_sdxl_add", "sdxl", 64, "SDXL, DINOv2-large"),
    "sd35m": shipped("distil_sd3.5_medium", "sd35m", 64, "SD 3.5 medium"),
    "flux": shipped("distil_flux1_dev", "flux", 64, "FLUX.1 dev, 2 + 2 of 19 + 38 blocks"),
    "klein": general("klein", 128, "FLUX.2 klein 4B, 1 + 2 of 5 + 20 blocks", "EmptyFlux2LatentImage"),
    "zimage": general("zimage", 64, "Z-Image, 2 of 30 layers"),
    "qwen": general("qwen", 64, "Qwen-Image, 2 of 60 blocks"),
    "wan": general("wan", 64, "Wan 2.1 1.3B, 4 of 30 blocks", "EmptyHunyuanLatentVideo"),
    "chroma": general("chroma", 64, "Chroma, 2 + 2 of 19 + 38 blocks"),
    "sdxl turbo": shipped("tune_sdxl_turbo", "sdxl", 64, "SDXL-Turbo"),
    "schnell": shipped("tune_flux1_schnell", "schnell", 64, "FLUX.1 schnell, 2 + 2 of 19 + 38 blocks"),
    "zimage turbo": shipped("tune_z_image_turbo", "zimage", 64, "Z-Image-Turbo, 2 of 30 layers"),
}


def files_of(row: Row) -> list[tuple[str, str]]:
    """(network, file in the host's folder of models) of every loader in the workflow."""
    tiny, found = f"tae{SHAPES[row.network].latent[0]}", []
    for entry in row.workflow.values():
        given = entry["inputs"]
        match entry["class_type"]:
            case "CheckpointLoaderSimple":
                found.append((row.network, f"checkpoints/{given['ckpt_name']}"))
            case "UNETLoader":
                found.append((row.network, f"diffusion_models/{given['unet_name']}"))
            case "CLIPVisionLoader":
                found.append(("dinov2", f"clip_vision/{given['clip_name']}"))
            case "VAELoader" if given["vae_name"].startswith("tae"):
                coders = (f"vae_approx/{given['vae_name']}_{part}.safetensors" for part in ("encoder", "decoder"))
                found += [(tiny, file) for file in coders]
            case "VAELoader":
                found.append((tiny, f"vae/{given['vae_name']}"))
    return found


def small(row: Row) -> dict:
    """The row's workflow on random texts, at small sizes, for `TRAINED_STEPS` steps.

    Turbo Retention is left out: it samples for as long as hundreds of steps take.
    """
    text = SHAPES[row.network]
    clip = node("TestRandomClip", width=text.width, tokens=text.tokens, pooled=text.pooled)
    graph = {key: deepcopy(entry) for key, entry in row.workflow.items() if key != "retention"}
    batch = graph["train"]["inputs"]["batch_size"]
    changes = {
        "TurboDistillPrompts": dict(prompts=PROMPTS, file="none"),
        "TurboDistillTeacherLatents": dict(sizes=f"{row.px}x{row.px}", count=batch, steps=TEACHER_STEPS),
        "TurboDistillPictureFolder": dict(size=row.px, step=32),
        "BasicScheduler": dict(steps=TEACHER_STEPS),
    }
    for key, entry in graph.items():
        kind, given = entry["class_type"], entry["inputs"]
        given |= changes.get(kind, {})
        if kind.startswith("Empty"):
            given |= dict(width=row.px, height=row.px, batch_size=1)
            given |= dict(length=1) if kind == "EmptyHunyuanLatentVideo" else {}
        if kind in CLIP_LOADERS:
            graph[key] = clip
        for name, value in given.items():
            if value == link("checkpoint", 1):
                given[name] = link("clip")
    graph["train"]["inputs"] |= dict(steps=TRAINED_STEPS)
    if graph["train"]["class_type"] == "TurboDistillTuneTrainer":
        graph["train"]["inputs"] |= dict(keep_count=batch)
    return graph | {"clip": clip}


def quick(row: Row, batch: int) -> Row:
    """A row in less time: smaller batches, and no picture."""
    kept = {
        key: row.workflow[key] for key in ("checkpoint", "prompts", "positive", "negative", "dataset", "train", "lora")
    }
    without = {name: value for name, value in kept["train"]["inputs"].items() if not name.startswith("preview_")}
    kept["train"] = kept["train"] | {"inputs": without | {"batch_size": batch}}
    return row._replace(workflow=kept | {"latent": row.workflow["latent"]})


def without_preflight(graph: dict) -> dict:
    """The same with the one widget off that lets a run pass whose preflight has refused it."""
    settings = graph.get("settings", node("TurboDistillTrainingSettings"))
    train = graph["train"] | {"inputs": graph["train"]["inputs"] | {"settings": link("settings")}}
    settings = settings | {"inputs": settings["inputs"] | {"preflight": False}}
    return graph | {"settings": settings, "train": train}


def with_lora(graph: dict, lora_name: str) -> dict:
    """The saved LoRA on the same model by core's own loader, sampled by Turbo Sampler with what the file says."""
    loaders = {key: entry for key, entry in graph.items() if key in ("checkpoint", "unet", "clip", "latent")}
    model = graph["train"]["inputs"]["model"]
    return loaders | {
        "text": node("CLIPTextEncode", text=PROMPTS, clip=link("clip")),
        "loaded": node("LoraLoaderModelOnly", model=model, lora_name=lora_name, strength_model=1.0),
        "sampled": turbo_sampler(link("loaded"), link("text"), link("latent")),
        "saved": node("SaveLatent", samples=link("sampled"), filename_prefix="with_lora"),
    }
