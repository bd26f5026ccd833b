"""Workflows in API format that several tests queue: the mini model distilled in the graph."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from server import Host

from distill_core.evaluation.metrics import mini_scores
from distill_core.models import mini

SCALE, SHIFT = 1.5305, 0.0609  # the host's units of SD3 latents: x / SCALE + SHIFT


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def mini_dataset(name: str, **teacher) -> dict:
    """The mini model without a shift, its conditionings, and a dataset of a few of its latents; None: not connected."""
    settings = dict(
        model=["teacher", 0],
        positive=["classes", 0],
        negative=["none", 0],
        dataset_name=name,
        count=64,
        sizes="64x64",
        steps=4,
        cfg=1.5,
        pairs_for_steps=1,
        batch_size=64,
        dtype="float32",
    )
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "teacher": node("ModelSamplingSD3", model=["mini", 0], shift=1.0),
        "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
        "none": node("TurboDistillMiniConditioning", class_name="none"),
        "dataset": node(
            "TurboDistillTeacherLatents", **{k: v for k, v in (settings | teacher).items() if v is not None}
        ),
    }


OWN = {  # widgets that only one trainer has
    "LADD": dict(renoise_mean=0.0, renoise_std=1.0),
    "ADD": dict(vae=["mini", 1], vision_size=32),
    "Diffusion2GAN": dict(critic_rank=4),
    "DMD2": dict(fake_score_updates=2),
}


def mini_training(
    run_name: str, dataset: str = "few", teacher: dict | None = None, method: str = "LADD", **trainer
) -> dict:
    """`mini_dataset` -> a trainer -> Save Turbo LoRA; a few quick steps unless ``trainer`` says otherwise (None: not
    connected)."""
    settings = dict(
        model=["teacher", 0],
        dataset=["dataset", 0],
        run_name=run_name,
        target_steps=1,
        steps=4,
        batch_size=8,
        student_lr=6e-4,
        discriminator_lr=4e-3,
        rank=4,
        sampler="ancestral",
        gradient_checkpointing=False,
    )
    settings = {k: v for k, v in (settings | OWN[method] | trainer).items() if v is not None}
    return mini_dataset(dataset, **(teacher or {})) | {
        "train": node(f"TurboDistill{method}Trainer", **settings),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{run_name}"),
    }


def class_samples(host: Host, model: dict, source: list, count: int, **sampling) -> torch.Tensor:
    """``count`` one-step latents of each class by Turbo Sampler, in model space; row i of a class is from (seed, i).

    model: nodes that load one, source: the link to it.
    """
    choice = dict(preset="auto", steps=1, denoise=1.0, denoise_mode="snap", seed=1000, sampler="of the preset", cfg=0.0)
    graph = model | {"latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=count)}
    for label, text in enumerate(mini.CLASS_NAMES):
        graph[f"class{label}"] = node("TurboDistillMiniConditioning", class_name=text)
        graph[f"sample{label}"] = node(
            "TurboDistillSampler",
            model=source,
            positive=[f"class{label}", 0],
            latent_image=["latent", 0],
            **(choice | sampling),
        )
        graph[f"save{label}"] = node("SaveLatent", samples=[f"sample{label}", 0], filename_prefix="class_samples")
    outputs = host.run(graph, 900)["outputs"]
    files = [outputs[f"save{label}"]["latents"][0] for label in range(len(mini.CLASS_NAMES))]
    parts = [load_file(host.base_dir / "output" / f["subfolder"] / f["filename"])["latent_tensor"] for f in files]
    return (torch.cat(parts) - SHIFT) * SCALE


def saved_student(lora_name: str) -> dict:
    """The mini model with a saved LoRA, loaded by core; its link is ["model", 0]."""
    return {
        "base": node("TurboDistillLoadMiniModel", distilled=False),
        "model": node("LoraLoaderModelOnly", model=["base", 0], lora_name=lora_name, strength_model=1.0),
    }


def guided_teacher(steps: int = 1) -> tuple[dict, dict]:
    """The mini model's nodes (link ["base", 0]) and how Turbo Sampler samples it as a guided teacher."""
    nodes = {
        "base": node("TurboDistillLoadMiniModel", distilled=False),
        "plain": node("ModelSamplingSD3", model=["base", 0], shift=1.0),
        "levels": node("BasicScheduler", model=["plain", 0], scheduler="simple", steps=steps, denoise=1.0),
        "none": node("TurboDistillMiniConditioning", class_name="none"),
    }
    return nodes, dict(sigmas=["levels", 0], steps=0, sampler="euler", cfg=1.5, negative=["none", 0])


def one_step_score(latents: torch.Tensor) -> dict[str, float]:
    """fd, accuracy, ... of latents that are 30 of each class in turn."""
    return mini_scores(latents, torch.arange(len(mini.CLASS_NAMES)).repeat_interleave(30))


def student_score(host: Host, lora_name: str) -> dict[str, float]:
    """Of 300 one-step samples of the student in a saved file."""
    return one_step_score(class_samples(host, saved_student(lora_name), ["model", 0], 30))


def teacher_score(host: Host) -> dict[str, float]:
    """Of 300 one-step samples of the guided teacher, from the same noises."""
    teacher, guided = guided_teacher()
    return one_step_score(class_samples(host, teacher, ["base", 0], 30, **guided))
