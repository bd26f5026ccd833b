"""Retention of a tuned MODEL beside what it was before, by the host's own sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...distill_core.data.mix import Mix, open_data
from ...distill_core.evaluation.concept_gain import OwnPictures, concept_gain
from ...distill_core.evaluation.retention import FINER, Asked, Figures, finer_levels, gaps, retention
from ...distill_core.evaluation.retention_report import MOST_COLUMNS, picture
from ...distill_core.models.denoiser import Denoiser
from ...distill_core.presets.recipe import Recipe, make_recipe
from .backend import training_backend
from .model import facts_of, training_process_of
from .sampling import fitting_latent
from .side_by_side import decode, sample_prompts

Answers = tuple[Tensor, Tensor]  # latents [N, C, H, W] as the turbo is sampled, and the squared step gaps [N]


def measure_retention(
    before,
    after,
    prompts: Sequence,
    *,
    latent: dict,
    noises: int,
    preset: str,
    seed: int,
    negative=None,
    vae=None,
    dataset: Path | Mix | None = None,
) -> tuple[Figures, Image.Image]:
    """The figures and the picture: both MODELs are asked the same at the settings of ``before``.

    latent: empty, of the size to sample at.  dataset: of own pictures that were held out.
    Raises ValueError for what does not fit together, before anything is sampled.
    """
    empty = torch.zeros_like(fitting_latent(before, latent)[:1])
    if fitting_latent(after, latent).shape[1:] != empty.shape[1:]:
        raise ValueError("before and after have latents of other shapes: connect the tuned model and the turbo it was")
    scale = before.get_model_object("latent_format").spacial_downscale_ratio
    size = {"height": empty.shape[-2] * scale, "width": empty.shape[-1] * scale}
    recipe = make_recipe(facts_of(before), preset, **size)
    if recipe.cfg != 1 and negative is None:
        raise ValueError(f"this turbo is sampled at cfg {recipe.cfg:g}: connect a negative conditioning")
    own = OwnPictures.of(open_data(dataset)) if dataset else None
    several = [prompt for _ in range(noises) for prompt in prompts]
    empty = empty.expand(len(several), *empty.shape[1:]).contiguous()
    bar = comfy.utils.ProgressBar(2 * (2 + FINER) * len(several) * (len(recipe.sigmas) - 1))

    def answers(model, changes: dict) -> Tensor:
        """[N, C, (1,) H, W] at the recipe with some changes."""
        changed = replace(recipe, **changes)
        steps = len(changed.sigmas) - 1
        return sample_prompts(
            model,
            several,
            negative,
            latent=empty,
            recipe=changed,
            seed=seed,
            at_once=len(prompts),
            done=lambda rows: bar.update(rows * steps),
        )

    euler = {"sampler": "euler", "sampler_options": {}}
    finer = {**euler, "sigmas": finer_levels(recipe.sigmas, training_process_of(before))}
    asked = [[answers(model, changes) for changes in ({}, euler, finer)] for model in (before, after)]
    (first, *walks_before), (second, *walks_after) = ([as_images(x) for x in walks] for walks in asked)
    figures = retention(first, second, len(prompts), (gaps(*walks_before), gaps(*walks_after)))
    if own:
        figures |= gain(before, after, own, recipe, seed)
    shown = [walks[0][:MOST_COLUMNS] for walks in asked]
    images = rough(shown) if vae is None else [decode(vae, x).float().cpu() for x in shown]
    return figures, picture(figures, *images)


def rough(latents: Sequence[Tensor]) -> list[Tensor]:
    """The first three channels of sets of latents as colours [N, H, W, 3], on one scale."""
    colours = [as_images(x)[:, [0, 1 % x.shape[1], 2 % x.shape[1]]].movedim(1, -1) for x in latents]
    low, high = min(x.min() for x in colours), max(x.max() for x in colours)
    return [(x - low) / (high - low).clamp(min=1e-6) for x in colours]


def as_images(latents: Tensor) -> Tensor:
    """[N, C, H, W] of latents in the host's layout; the first frame of a video."""
    return (latents[:, :, 0] if latents.ndim == 5 else latents).float().cpu()


def gain(before, after, own: OwnPictures, recipe: Recipe, seed: int) -> Figures:
    """How near samples of the own prompts come to the own pictures, seen by the turbo before."""
    asked = Asked([], recipe.sigmas, own.latents.shape[1:], 1, recipe.sampler, recipe.sampler_options, seed)
    device = before.load_device
    with training_backend(after, checkpointing=False) as backend:
        check_channels(own, backend.channels)
        tuned = own.samples(Denoiser(backend), asked, device)
    with training_backend(before, checkpointing=False) as backend:
        turbo = Denoiser(backend)
        samples = own.latents, own.samples(turbo, asked, device), tuned
        return concept_gain(*(own.features(turbo, x, device) for x in samples))


def check_channels(own: OwnPictures, channels: int) -> None:
    if own.latents.shape[1] != channels:
        raise ValueError(
            f"dataset has latents of {own.latents.shape[1]} channels, and this model's have {channels}: connect own "
            "pictures that were encoded with this model's VAE"
        )
