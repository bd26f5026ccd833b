"""Teacher and student laid side by side: pictures from the same noise, what they cost, and how far they are apart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from PIL import Image
from torch import Tensor

from ...distill_core.diffusion.noise import ItemNoise
from ...distill_core.evaluation import live_plots
from ...distill_core.evaluation.heat import difference_maps, heat_colours
from ...distill_core.perceptual import ELatentLPIPS
from ...distill_core.presets.recipe import Recipe
from ...distill_core.presets.table import counted
from .sampling import fitting_latent
from .side_by_side import decode, pixels_of, sample_prompts, student_recipe, teacher_recipe

MOST_COLUMNS = 10
WIDTH, CELL = 1280, (128, 320)  # of all pictures of a row, and of one of them, in pixels
WHITE_AT = 0.995  # of the differences: the rest is white, too, so that a few bright points do not darken all others


@dataclass(frozen=True)
class Row:
    """Pictures [N, H, W, 3] of one model by one recipe, from the noises of the other rows.

    seconds: of each picture, without loading the model.  far: [N, H, W], where it differs from the first row's, 0 to 1.
    distances: by E-LatentLPIPS to the first row's latents, where it is connected.
    """

    model: str
    recipe: Recipe
    images: Tensor
    far: Tensor
    seconds: float
    distances: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.recipe.sigmas) - 1

    @property
    def forwards(self) -> int:
        """Of the network for each picture: two a step with guidance."""
        return self.steps * (1 if self.recipe.cfg == 1 else 2)

    def label(self) -> str:
        guided = f", cfg {self.recipe.cfg:g}" if self.recipe.cfg != 1 else ""
        cost = f"{self.seconds:.2g} s, {self.forwards} forward{'s' * (self.forwards > 1)}"
        return f"{self.model}, {counted(self.steps)}{guided}\n{cost}"

    def figures(self, reference: Row) -> dict[str, Any]:
        """What the report says of it."""
        distance = {"e_latent_lpips": sum(self.distances) / len(self.distances)} if self.distances else {}
        return {
            "model": self.model,
            "steps": self.steps,
            "cfg": self.recipe.cfg,
            "sampler": self.recipe.sampler,
            "sigmas": [round(sigma, 5) for sigma in self.recipe.sigmas.tolist()],
            "forwards": self.forwards,
            "seconds": round(self.seconds, 4),
            "times_faster": round(reference.seconds / self.seconds, 2) if self.seconds else None,
            "difference": round(self.far.mean().item(), 5),
            **distance,
        }


def columns(prompts: Sequence, latent: dict, model) -> tuple[list, Tensor]:
    """A prompt and a row of an empty latent for each column: as many as there are prompts, or rows of the latent.

    Raises ValueError where both are several and their numbers differ, and for more than ten.
    """
    samples = torch.zeros_like(fitting_latent(model, latent))
    count = max(len(prompts), len(samples))
    if {len(prompts), len(samples)} - {1, count}:
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(samples)} latents: give one of them, or as many of both"
        )
    if count > MOST_COLUMNS:
        raise ValueError(f"{count} columns do not fit on a picture: give at most {MOST_COLUMNS} prompts or latents")
    return list(prompts) * (count // len(prompts)), samples.expand(count, *samples.shape[1:]).contiguous()


def compare(
    teacher,
    student,
    vae,
    prompts: Sequence,
    negative,
    *,
    latent: dict,
    steps: Sequence[int],
    teacher_steps: int,
    teacher_cfg: float,
    preset: str,
    seed: int,
    perceptual: ELatentLPIPS | None = None,
) -> Iterator[list[Row]]:
    """Rows of pictures from the same noises: the teacher as it is usually sampled, which the others are compared with;
    the teacher at each of ``steps``; the student at each of them. After each row, those that are there.

    Raises ValueError before the first row for what does not fit together.
    """
    prompts, empty = columns(prompts, latent, teacher)
    counts = dict.fromkeys([teacher_steps, *steps])
    plan = [("teacher", teacher, teacher_recipe(teacher, count, teacher_cfg)) for count in counts]
    size = pixels_of(student, empty)
    plan += [("student", student, student_recipe(student, n, preset, **size)) for n in dict.fromkeys(steps)]
    _check(latent, teacher, student, vae, negative, [recipe for _, _, recipe in plan], perceptual)
    rows: list[Row] = []
    first: Tensor | None = None  # latents of the first row
    for name, model, recipe in plan:
        comfy.model_management.load_models_gpu([model])  # the seconds are those of sampling
        begun = time.perf_counter()
        latents = sample_prompts(model, prompts, negative, latent=empty, recipe=recipe, seed=seed)
        seconds = (time.perf_counter() - begun) / len(latents)
        first = latents if first is None else first
        distances = () if perceptual is None else distances_of(perceptual, latents, first, seed)
        images = decode(vae, latents).float().cpu()
        far = difference_maps(images, rows[0].images if rows else images)
        rows.append(Row(name, recipe, images, far, seconds, distances))
        yield rows


def _check(latent: dict, teacher, student, vae, negative, recipes: Sequence[Recipe], perceptual) -> None:
    """Raises ValueError for what the last row would fail at, after minutes of sampling."""
    of_teacher, of_student = (fitting_latent(model, latent).shape[1:] for model in (teacher, student))
    if of_teacher != of_student:
        raise ValueError(
            f"teacher and student have latents of shapes {tuple(of_teacher)} and {tuple(of_student)}, so they cannot "
            "start from the same noise: connect a student of this teacher"
        )
    if vae is None:
        raise ValueError("vae is empty (a checkpoint without a VAE): connect Load VAE")
    guided = next((recipe.cfg for recipe in recipes if recipe.cfg != 1), None)
    if guided is not None and negative is None:
        raise ValueError(f"cfg {guided:g} needs a negative conditioning: connect one to negative")
    if perceptual is not None and perceptual.channels != of_teacher[0]:
        raise ValueError(
            f"perceptual is for latents of {perceptual.channels} channels, but these models' have {of_teacher[0]}: "
            "load the E-LatentLPIPS of this family, or leave it out"
        )


def distances_of(perceptual: ELatentLPIPS, latents: Tensor, reference: Tensor, seed: int) -> tuple[float, ...]:
    """E-LatentLPIPS of each pair; the first frame of a video."""
    device = perceptual.head0.device
    images = [x[:, :, 0] if x.ndim == 5 else x for x in (latents, reference)]
    a, b = (perceptual.from_autoencoder(x.float().to(device)) for x in images)
    with torch.no_grad():
        return tuple(perceptual(a, b, ItemNoise(seed, range(len(a)))).tolist())


def grid_of(rows: Sequence[Row]) -> Image.Image:
    """All rows, and under each but the first a map of where it differs from the first; brightness means the same in all
    of them."""
    first, *others = rows
    maps = [row.far for row in others]
    top = torch.cat([m.flatten() for m in maps])[:: max(1, sum(m.numel() for m in maps) // 10**6)] if maps else None
    white = top.quantile(WHITE_AT).clamp(min=1e-3) if top is not None else 1.0
    lines = [(first.label(), first.images)]
    for row in others:
        distance = f"\nE-LatentLPIPS {sum(row.distances) / len(row.distances):.3g}" if row.distances else ""
        lines.append((row.label(), row.images))
        lines.append((f"difference {row.far.mean():.3f}{distance}", heat_colours(row.far / white)))
    cell = min(max(WIDTH // len(first.images), CELL[0]), CELL[1])
    return live_plots.grid(lines, "the same noise in every column", cell)
