"""Teacher and student from the same noise, sampled quietly and in pieces that fit memory; for pictures of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import comfy.model_management
import torch
from torch import Tensor

from ...distill_core.diffusion.schedules import grid_sigmas
from ...distill_core.presets.recipe import AUTO, Recipe, make_recipe
from .model import facts_of, training_process_of
from .sampling import sample_latent
from .teacher import join_conditionings, one_entry

SHARE = 0.7  # of the free memory that a piece may take by the host's own estimate


def empty_latent(model, prompts: int, shape: Sequence[int]) -> Tensor:
    """Zeros [N, C, H, W] of MODEL for a latent's shape [C, H, W]; with one frame where the model is a video's."""
    channels, *size = shape
    frames = (1,) if model.get_model_object("latent_format").latent_dimensions == 3 else ()
    return torch.zeros(prompts, channels, *frames, *size)


def pixels_of(model, latent: Tensor) -> dict[str, int]:
    """Width and height of the pictures of latents [..., H, W] of MODEL."""
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    return {"width": latent.shape[-1] * scale, "height": latent.shape[-2] * scale}


def teacher_recipe(model, steps: int, cfg: float) -> Recipe:
    """Euler at the model's own evenly spaced levels."""
    return Recipe(grid_sigmas(training_process_of(model), steps), "euler", {}, cfg, "")


def student_recipe(model, steps: int, preset: str = AUTO, **size: int) -> Recipe:
    """What Turbo Sampler takes; size: width and height in pixels, for families whose levels depend on them."""
    return make_recipe(facts_of(model), preset, steps=steps, **size)


def sample_prompts(
    model,
    prompts: Sequence,
    negative,
    *,
    latent: Tensor,
    recipe: Recipe,
    seed: int,
    at_once: int = 0,
    done: Callable[[int], object] = lambda rows: None,
    negatives: Sequence = (),
    mask: Tensor | None = None,
) -> Tensor:
    """A latent for each prompt, row i from (seed, i), as if they were one batch.

    latent: [N, ...], empty, or pictures where ``mask`` [N, 1, H, W] says what is to be filled.  negatives: of each
    prompt, instead of one for all.  No previews are shown. Prompts of other lengths are sampled apart; a piece that
    memory does not hold is tried again in halves.  at_once: at most so many in a piece, 0 for what memory holds.  done:
    hears how many were in the piece that has just been sampled. Raises torch.OutOfMemoryError where not even one fits.
    """
    parts: list[Tensor] = []
    for rows in runs_of_one_length(prompts):
        most = min(most_at_once(model, latent.shape, recipe.cfg), at_once or len(rows))
        while rows:
            piece, rest = rows[:most], rows[most:]
            part = {"samples": latent[piece.start : piece.stop], "batch_index": list(piece)}
            positive = join_conditionings([prompts[i] for i in piece])
            if mask is not None:
                part["noise_mask"] = mask[piece.start : piece.stop]
            if recipe.cfg == 1:
                guide = None
            else:
                guide = join_conditionings([negatives[i] for i in piece]) if negatives else negative
            try:
                sampled, _ = sample_latent(
                    model, positive, guide, latent=part, recipe=recipe, seed=seed, previews=False
                )
            except Exception as error:
                if not comfy.model_management.is_oom(error) or len(piece) == 1:
                    raise
                most = len(piece) // 2
                comfy.model_management.soft_empty_cache()
                continue
            parts.append(sampled["samples"])
            done(len(piece))
            rows = rest
    return torch.cat(parts)


def runs_of_one_length(prompts: Sequence) -> list[range]:
    """The prompts' numbers, cut where the shape of their tokens changes."""
    shapes = [one_entry(prompt)[0].shape for prompt in prompts]
    runs = [[i for i, _ in run] for _, run in groupby(enumerate(shapes), key=lambda numbered: numbered[1])]
    return [range(run[0], run[-1] + 1) for run in runs]


def most_at_once(model, shape: Sequence[int], cfg: float) -> int:
    """How many latents of this batch's shape [N, ...] the free memory holds by the host's estimate; at least one."""
    device, rows = model.load_device, 1 if cfg == 1 else 2
    one = model.model.memory_required([rows, *shape[1:]])
    free = comfy.model_management.get_free_memory(device)
    if device.type != "cpu":
        free -= model.model_size() - model.loaded_size()
    return min(shape[0], max(1, int(SHARE * free / max(1, one))))


def decode(vae, samples: Tensor) -> Tensor:
    """Images [N, H, W, 3] of latents; the first frame of a video."""
    images = vae.decode(samples)
    return images[:, 0] if images.ndim == 5 else images
