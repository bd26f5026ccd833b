"""The commands that use a student: ``sample`` and ``evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import LatentDataset
from ..diffusion.samplers import SAMPLERS, sample_many
from ..diffusion.schedules import grid_sigmas
from ..evaluation.metrics import ImageFeatures, fd_between, trained_on
from ..files import fingerprint, read_lora, save_json
from ..models.denoiser import Denoiser, Guided
from ..models.pipelines import open_source, read_prompts
from ..presets.recipe import student_levels
from ..training.config import Config, load_config


def load_student(config: Config, lora: Path) -> tuple[Any, Denoiser, dict]:
    """(source, student, description) of a student's file. Raises ValueError when it is of another base model."""
    source = open_source(config.model)
    state, description = read_lora(lora)
    base = fingerprint(source.backend.network)
    if description["base"] != base:
        raise ValueError(f"{lora} was distilled from another model (base {description['base']}, this one is {base})")
    if description.get("sampler") not in SAMPLERS:
        raise ValueError(f"{lora} asks for the sampler {description.get('sampler')!r}; known: {list(SAMPLERS)}")
    if description.get("weights") == "differences":
        source.backend.add_differences(state)
        return source, Denoiser(source.backend), description
    return source, Denoiser(source.backend, source.backend.open_lora(state)), description


def run_sample(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    model: Denoiser | Guided
    if args.lora:
        source, model, description = load_student(config, args.lora)
        sigmas, sampler = student_levels(description["sigmas"], args.steps), sampler_of(description)
    else:
        source = open_source(config.model)
        sigmas, sampler = grid_sigmas(source.backend.process, args.steps or 25), {"sampler": "euler"}
    prompts = read_prompts(config.prompts.prompts, source)
    conds, uncond = source.encode(prompts, config.prompts.negative)
    model = model if args.lora else Guided(Denoiser(source.backend), uncond, config.cache.guidance)
    shape = (source.channels, *config.cache.sizes[0])
    latents = sample_many(model, sigmas, conds, shape, seed=args.seed, count=args.count, progress=True, **sampler)
    images = torch.cat([source.decode(part) for part in latents.split(config.cache.batch_size)])
    args.out.mkdir(parents=True, exist_ok=True)
    save_images(images, prompts, args)


def sampler_of(description: dict) -> dict:
    """The arguments of `samplers.sample` that a LoRA's description asks for."""
    return {"sampler": description["sampler"], **description.get("sampler_options", {})}


def save_images(images: Tensor, prompts: list[str], args: argparse.Namespace) -> None:
    from PIL import Image

    for i, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(args.out / f"{i:05d}.png")
    record = [
        {"file": f"{i:05d}.png", "prompt": prompts[i % len(prompts)], "seed": args.seed} for i in range(len(images))
    ]
    save_json(args.out / "samples.json", record)


def run_evaluate(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    source, student, description = load_student(config, args.lora)
    dataset = LatentDataset(args.data)
    features = ImageFeatures(source)
    bucket, items = max(dataset.buckets.items(), key=lambda entry: len(entry[1]))  # one size: that of the samples
    shape, items = bucket[:3], items[: args.count]
    batches = [items[i : i + 50] for i in range(0, len(items), 50)]
    reference = torch.cat([features(dataset.read(part).latents) for part in tqdm(batches, desc="reference")])
    prompts = read_prompts(config.prompts.prompts, source)
    conds, _ = source.encode(prompts, config.prompts.negative)
    report: dict[str, Any] = {"reference": len(reference), "count": args.count, "seed": args.seed, "fd": {}}
    report["independent"] = not trained_on(description)
    if not report["independent"]:
        print(
            "warning: this student was trained against the network that scores it, so fd flatters it", file=sys.stderr
        )
    for steps in range(1, len(description["sigmas"]) + 1):
        sigmas = student_levels(description["sigmas"], steps)
        latents = sample_many(
            student, sigmas, conds, shape, seed=args.seed, count=args.count, progress=True, **sampler_of(description)
        )
        report["fd"][str(steps)] = fd_between(features(latents), reference)
    save_json(args.out / "evaluation.json", report)
    print(json.dumps(report, indent=1))
