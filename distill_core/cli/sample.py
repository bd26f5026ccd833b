"""The command ``sample``, and how a student's file is opened."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import CacheConfig
from ..data.dataset import Batch, LatentDataset
from ..data.fits import check_fits
from ..diffusion.samplers import SAMPLERS, sample_many
from ..diffusion.schedules import grid_sigmas
from ..files import save_json
from ..lora_files import read_lora
from ..models.denoiser import Backend, Cond, Denoiser, Guided
from ..models.guidance import edits, guided
from ..models.items import IMAGE_STRENGTH, TEXT_STRENGTH
from ..models.pipelines import open_source, read_prompts
from ..models.strengths import NAMES, chosen_strengths, config_of_file, split_strengths
from ..models.teachers import teacher_view
from ..presets.origin import origin_notes
from ..presets.recipe import shift_of, student_levels
from ..settings import check_value, range_of
from ..training.config import Config, load_config


def read_student(lora: Path) -> tuple[dict[str, Tensor], dict]:
    """A student's tensors and description. Raises ValueError for a LoRA that has no noise levels of its own, and when
    it asks for a sampler that is not known."""
    state, description = read_lora(lora)
    if "sigmas" not in description:
        raise ValueError(
            f"{lora} ({description['method']}) has no noise levels of its own, it is used as the model is: name it in "
            "[teacher] lora, and a student that has them with --lora"
        )
    if description.get("sampler") not in SAMPLERS:
        raise ValueError(f"{lora} asks for the sampler {description.get('sampler')!r}; known: {list(SAMPLERS)}")
    return state, description


def open_student(source: Any, state: dict[str, Tensor], description: dict) -> Denoiser:
    """The student in the source's network. Its description gets ``warnings``, which are also printed: made above
    another model or a LoRA. Raises ValueError for a student that does not fit this network.

    Differences of all weights stay in the network, which is then no longer the teacher.
    """
    described = {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()}
    # A student is told what it was trained at; files from before there was a setting were trained at 1.
    source.embedded_guidance = description.get("embedded_guidance", 1.0)
    here = source.backend.description()
    description["warnings"] = origin_notes(described, here["base"], here["base_layout"], here.get("below", ()))
    for warning in description["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    state, embedding = split_strengths(state)
    if description.get("weights") == "differences":
        source.backend.add_differences(state)
        student = Denoiser(source.backend)
    else:
        student = Denoiser(source.backend, source.backend.open_lora(state))
    if told := description.get("strengths"):
        student.strengths = source.backend.new_strengths(config_of_file(told, embedding))
        student.strengths.load_export(embedding)
    return student


def load_student(config: Config, lora: Path) -> tuple[Any, Denoiser, dict]:
    """(source, student, description) of a student's file. Errors as for `read_student` and `open_student`."""
    state, description = read_student(lora)
    source = open_source(config.model)
    return source, open_student(source, state, description), description


def run_sample(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    model: Any
    if args.lora:
        source, model, description = load_student(config, args.lora)
        sampler = sampler_of(description)
    else:
        source = open_source(config.model, config.cache.embedded_guidance)
        model = teacher_view(config.teacher, config.model, source)
        sigmas, sampler = grid_sigmas(source.backend.process, args.steps or 25), {"sampler": "euler"}
    if args.data:
        dataset = LatentDataset(args.data)
        check_fits(dataset, source.backend.limits())
        batch = first_items(dataset, args.count)
        conds, uncond = batch.cond.to(source.device), dataset.uncond().to(source.device)
        shape, count = tuple(batch.latents.shape[1:]), len(batch.latents)
        records: list[dict[str, Any]] = [{"item": i} for i in range(count)]
    else:
        prompts = read_prompts(config.prompts.prompts, source)
        conds, uncond = source.encode(prompts, config.prompts.negative)
        shape, count = (source.channels, *config.cache.sizes[0]), args.count
        records = [{"prompt": prompts[i % len(prompts)]} for i in range(count)]
    if args.lora:
        sigmas = levels_for(source.backend, description, shape, args.steps)
        conds = conds.with_items(student_strengths(args, description, len(conds)))
        model = Guided(model, uncond, description.get("cfg", 1.0))
    else:
        conds = conds.with_items(teacher_strengths(args, config, model, conds))
        model = guided(model, uncond, config.cache.guidance)
    latents = sample_many(model, sigmas, conds, shape, seed=args.seed, count=count, progress=True, **sampler)
    images = torch.cat([source.decode(part) for part in latents.split(config.cache.batch_size)])
    args.out.mkdir(parents=True, exist_ok=True)
    save_images(images, records, args)


def asked_strengths(args: argparse.Namespace) -> dict[str, float]:
    """What --text-strength and --image-strength say, by the names in a conditioning. Raises ValueError out of range."""
    said = {TEXT_STRENGTH: args.text_strength, IMAGE_STRENGTH: args.image_strength}
    asked = {name: value for name, value in said.items() if value is not None}
    for name, value in asked.items():
        check_value(f"--{name.replace('_', '-')}", value, range_of(CacheConfig, name))
    return asked


def teacher_strengths(args: argparse.Namespace, config: Config, teacher: Denoiser, conds: Cond) -> dict[str, Tensor]:
    """The strengths [B] at which the teacher edits: those asked for, else the items' own, else as CONFIG draws them.

    Raises ValueError for strengths of a teacher that edits no picture.
    """
    asked = asked_strengths(args)
    if not edits(teacher):
        if asked:
            raise ValueError(
                "--text-strength and --image-strength are of a model that edits a picture, and this one takes none: "
                "leave them out, and set [cache] guidance"
            )
        return {}
    own = {name: value for name, value in conds.extra.items() if name in (TEXT_STRENGTH, IMAGE_STRENGTH)}
    items = range(len(conds))
    return {
        **(own or config.cache.strengths(items)),
        **{name: torch.full((len(items),), value) for name, value in asked.items()},
    }


def student_strengths(args: argparse.Namespace, description: dict, count: int) -> dict[str, Tensor]:
    """The strengths [B] that a student is told: those asked for, else the defaults of its file.

    Raises ValueError for strengths beyond those that it was trained at, or of a student that cannot be told any.
    """
    asked, told = asked_strengths(args), description.get("strengths")
    if not told:
        if asked:
            raise ValueError(
                f"{args.lora} is a student that is told no strengths, it has those of its training data: leave "
                "--text-strength and --image-strength out, or train one with [strengths] told = true"
            )
        return {}
    strengths = chosen_strengths(told, asked, str(args.lora), lambda name: f"--{name.replace('_', '-')}")
    return {name: torch.full((count,), value) for name, value in zip(NAMES, strengths, strict=True)}


def first_items(dataset: LatentDataset, count: int) -> Batch:
    """Up to ``count`` items of the dataset's largest bucket, in order, with what belongs to each."""
    return dataset.read(dataset.largest[:count])


def levels_for(backend: Backend, description: dict, shape: Sequence[int], steps: int | None) -> Tensor:
    """The grid of a student for latents [C, H, W]."""
    pixels = backend.limits().pixels
    return student_levels(description["sigmas"], steps, shift_of(description, pixels * shape[2], pixels * shape[1]))


def sampler_of(description: dict) -> dict:
    """The arguments of `samplers.sample` that a LoRA's description asks for."""
    return {"sampler": description["sampler"], **description.get("sampler_options", {})}


def save_images(images: Tensor, records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The images as PNG, and what each was asked for."""
    from PIL import Image

    for i, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(args.out / f"{i:05d}.png")
    named = [{"file": f"{i:05d}.png", **record, "seed": args.seed} for i, record in enumerate(records)]
    save_json(args.out / "samples.json", named)
