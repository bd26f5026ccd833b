"""The command ``evaluate``: a student and its teacher on noises that no training has seen, every figure with its
interval."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import LatentDataset
from ..diffusion.schedules import grid_sigmas
from ..evaluation.intervals import Figure
from ..evaluation.metrics import Evaluator, Figures
from ..evaluation.samples import REFERENCE, evaluation_samples
from ..evaluation.spaces import imagenet_features, imagenet_space, shipped_spaces, trained_on
from ..files import save_json
from ..models.denoiser import Cond, Denoiser, Guided
from ..models.pipelines import MiniSource, PipelineSource, open_source, read_prompts
from ..models.teachers import teacher_view
from ..presets.table import counted
from ..training.config import load_config
from .sample import levels_for, open_student, read_student, sampler_of

BATCH = 25


@dataclass(frozen=True)
class Conditions:
    """What every model is sampled with: prompts with their conditionings, the latents' shape, the noises."""

    prompts: list[str]
    conds: Cond
    uncond: Cond
    shape: tuple[int, ...]
    seed: int
    count: int

    def sample(self, model: Denoiser | Guided, sigmas: Tensor, **options) -> Tensor:
        """Latents on the CPU; item i has prompt i mod their number."""
        return evaluation_samples(
            model, sigmas, self.conds, self.shape, seed=self.seed, count=self.count, progress=True, **options
        ).cpu()


def run_evaluate(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    state, description = read_student(args.lora)
    held_out = open_reference(args, description)
    source = open_source(config.model)
    prompts = read_prompts(str(args.prompts or config.prompts.prompts), source)
    shape = held_out.shapes[0] if held_out else (source.channels, *config.cache.sizes[0])
    conditions = Conditions(
        prompts, *source.encode(prompts, config.prompts.negative), tuple(shape), args.seed, args.count
    )
    # The teacher first: a student whose every weight was trained is put into the same network.
    grid = grid_sigmas(source.backend.process, config.cache.steps)
    teacher = Guided(teacher_view(config.teacher, config.model, source), conditions.uncond, config.cache.guidance)
    own = conditions.sample(teacher, grid, sampler="euler")
    reference = (
        latents_of(held_out, args.count)
        if held_out
        else conditions.sample(teacher, grid, sampler="euler", purpose=REFERENCE)
    )
    evaluator = make_evaluator(source, reference, description)
    rows = torch.arange(args.count) % len(prompts)
    asked = source.labels(prompts) if isinstance(source, MiniSource) else {}
    labels = {group: classes[rows] for group, classes in asked.items()}
    scores: dict[str, Figures] = {f"teacher, {config.cache.steps} steps": evaluator(own, labels)}
    student = open_student(source, state, description)
    for steps in range(1, len(description["sigmas"]) + 1):
        guided = Guided(student, conditions.uncond, description.get("cfg", 1.0))
        latents = conditions.sample(
            guided, levels_for(source.backend, description, shape, steps), **sampler_of(description)
        )
        scores[f"student, {counted(steps)}"] = evaluator(latents, labels, own)
    report = {
        "count": args.count,
        "seed": args.seed,
        "reference": {"items": len(reference), "from": str(args.data) if held_out else "the teacher, other noises"},
        "warnings": description["warnings"],
        "independent": not trained_on(description),
        **in_numbers(scores),
    }
    save_json(args.out / "evaluation.json", report)
    print(in_text(scores, report))


def was_trained_on(dataset: LatentDataset, description: dict[str, Any]) -> bool:
    """Whether a file says that it was trained on the dataset, alone or in a mix."""
    config = description.get("config", {})
    return dataset.digest() in (config.get("dataset"), *config.get("mix", ()))


def open_reference(args: argparse.Namespace, description: dict[str, Any]) -> LatentDataset | None:
    """The latents that ``--data`` names. Raises ValueError for those that the student was trained on."""
    if args.count < 2:
        raise ValueError(f"--count must be at least 2, not {args.count}: one image has no spread")
    if args.data is None:
        return None
    dataset = LatentDataset(args.data)
    if was_trained_on(dataset, description):
        raise ValueError(
            f"--data {args.data} is what this student was trained on, and a student is near to what it has seen; leave "
            "--data out to compare with the teacher on other noises, or name latents that it has not seen"
        )
    return dataset


def latents_of(dataset: LatentDataset, count: int) -> Tensor:
    """Up to ``count`` latents of the dataset's first size."""
    shape = dataset.shapes[0]
    items = [item for bucket, of in dataset.buckets.items() if tuple(bucket[:3]) == tuple(shape) for item in of]
    return torch.cat([dataset.read([item]).latents for item in tqdm(items[:count], desc="reference")])


def make_evaluator(source: MiniSource | PipelineSource, reference: Tensor, description: dict[str, Any]) -> Evaluator:
    """ImageNet features, unless the student was trained against them; for a shipped model its classifiers, too."""
    spaces = shipped_spaces(source)
    if trained_on(description):
        print(
            "warning: this student was trained against the ImageNet network, so no figure is taken from it",
            file=sys.stderr,
        )
    else:
        parts = [imagenet_features(source.decode(part.to(device_of(source)))) for part in reference.split(BATCH)]
        spaces.append(imagenet_space(torch.cat(parts)))
    return Evaluator(spaces, lambda latents: source.decode(latents.to(device_of(source))).float().cpu(), size=BATCH)


def device_of(source: MiniSource | PipelineSource) -> torch.device:
    return next(source.backend.network.parameters()).device


def in_numbers(scores: dict[str, Figures]) -> dict[str, Any]:
    """For JSON: all figures, and what each student has over the teacher, every one with its interval."""
    teacher, *students = scores
    return {
        "figures": {name: {key: f.plain() for key, f in of.items()} for name, of in scores.items()},
        "differences": {
            name: {key: f.plain() for key, f in differences(scores[name], scores[teacher]).items()} for name in students
        },
    }


def differences(student: Figures, teacher: Figures) -> dict[str, Figure]:
    return {name: figure - teacher[name] for name, figure in student.items() if name in teacher}


def in_text(scores: dict[str, Figures], report: dict[str, Any]) -> str:
    """A line a figure: its interval, and that of the difference to the teacher's."""
    teacher, *_ = scores
    lines = [f"{report['count']} images each; reference: {report['reference']['items']}, {report['reference']['from']}"]
    lines.append("figure [95 % interval], and the difference to the teacher, image by image")
    for name, of in scores.items():
        lines.append(f"\n{name}")
        apart = {} if name == teacher else differences(of, scores[teacher])
        for key, figure in of.items():
            beside = f"{apart[key]:+.3f}" if key in apart else ""
            lines.append(f"  {key.replace('_', ' '):20}{f'{figure:.3f}':>28}{beside:>32}")
    return "\n".join(lines)
