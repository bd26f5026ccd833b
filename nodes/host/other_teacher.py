"""Another MODEL as the teacher than the one that is distilled: LoRAs on the same weights, or a network of its own.

What the teacher's MODEL has more LoRAs than the student's is computed beside the student's own network, and takes no
second one. For anything else (another file, merged models, other patches) the teacher is copied as MODEL is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...distill_core.models.denoiser import Denoiser
from ...distill_core.models.lora import is_linear
from ...distill_core.models.lora_stack import frozen_parts
from ...distill_core.models.lora_start import Parts
from ...distill_core.models.teachers import Teacher
from .backend import ComfyBackend, training_backend
from .carried import carried, check_teachable
from .identity import identity, loras_below
from .lora_keys import layer_of, part_of
from .model import file_of, is_flow, prediction_of

if TYPE_CHECKING:
    from .training import Request

INPUT = "teacher_model"


@contextmanager
def open_teacher(request: Request, backend: ComfyBackend, folder: Path) -> Iterator[Teacher | None]:
    """The teacher of a run on ``backend``, None where it is the model itself; its copy is given back on exit.

    folder: of the run. Raises ValueError for a MODEL that cannot be trained through.
    """
    if (other := request.other_teacher) is None:
        yield None
        return
    name, digest = called(other), identity(other)
    if (parts := further_loras(request.model, other)) is not None:
        lora = frozen_parts(backend, parts, name, INPUT)
        yield Teacher(Denoiser(backend, lora, name=name), digest)
        return
    with training_backend(other, request.checkpointing, request.train, folder / "teacher", backend) as own:
        yield Teacher(Denoiser(own, name=name), digest)


def check_other(model, other) -> None:
    """Raises ValueError for a teacher that is known, before anything is copied, to be none of this model."""
    try:
        check_teachable(other)
    except ValueError as error:
        raise ValueError(f"{INPUT}: {error}") from None
    channels = [each.get_model_object("latent_format").latent_channels for each in (other, model)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"{INPUT}: {called(other)} takes latents of {channels[0]} channels, the model {channels[1]}: a teacher "
            "must share the autoencoder and the text encoders with the model; choose another size or checkpoint of "
            "its kind"
        )


def is_itself(model, other) -> bool:
    """Whether a teacher computes what the model does."""
    return other is model or _patches_above(model, other) == {}


def further_loras(model, other) -> Parts | None:
    """By layer, the LoRAs that ``other`` has on the same weights after those of ``model``; None where the two differ in
    anything else."""
    linear = {name for name, layer in model.model.diffusion_model.named_modules() if is_linear(layer)}
    parts: Parts = defaultdict(list)
    for weight, patches in (_patches_above(model, other) or {}).items():
        for strength, adapter, of_model, rows, reorder in patches:
            part, layer = part_of(adapter, rows, reorder, strength), layer_of(weight)
            if part is None or of_model != 1 or layer not in linear:
                return None
            parts[layer].append(part)
    return dict(parts) or None


def called(model) -> str:
    """What files and messages call a MODEL: its file, or its network's class, and how many LoRAs are on it."""
    file, count = file_of(model), len(loras_below(model))
    name = file.name if file else type(model.model.diffusion_model).__name__
    return name + (f" with {count} LoRA{'s' if count > 1 else ''}" if count else "")


def _patches_above(model, other) -> dict[str, list] | None:
    """The host's patches by weight that ``other`` has after those of ``model``, None where it is more than patches."""
    if other.model is not model.model or carried(model) or carried(other) or not _same_sampling(model, other):
        return None
    above = {}
    for weight in {**model.patches, **other.patches}:
        own, theirs = model.patches.get(weight, []), other.patches.get(weight, [])
        if len(theirs) < len(own) or any(mine is not its for mine, its in zip(own, theirs, strict=False)):
            return None
        if further := theirs[len(own) :]:
            above[weight] = further
    return above


def _same_sampling(model, other) -> bool:
    """Whether two MODELs of one network are told the same time for a noise level, and say the same by their output.
    The shift of a flow decides which levels are visited, and nothing at a level."""
    a, b = (each.get_model_object("model_sampling") for each in (model, other))
    if a is b:
        return True
    if prediction_of(a) != prediction_of(b):
        return False
    if is_flow(a):
        return all(getattr(a, name, 1.0) == getattr(b, name, 1.0) for name in ("multiplier", "noise_scale"))
    return torch.equal(a.sigmas.cpu(), b.sigmas.cpu())
