"""From a model, a choice and a step count to everything a sampler needs: levels, sampler, cfg, and why.

The nodes of ComfyUI and scripts share this; it knows a model only through `ModelFacts`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from ..diffusion.process import NoiseProcess, TimestepProcess
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import DENOISE_MODES, check_sigmas, explicit_sigmas
from ..files import NAMESPACE
from .table import DEFAULT_SIZE, Preset, auto_preset, explain, find_preset, preset_sigmas, presets_of

AUTO = "auto"


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe depends on.

    family: architecture as in the table of presets, None if it is none of them.  process: sigma of a timestep and the
    like (`process.py`; ComfyUI's ``model_sampling``).  table: a discrete model's sigmas [T], None for flow models.
    metadata: strings from the checkpoint's or LoRA's file.
    """

    family: str | None
    process: NoiseProcess
    table: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """sigmas [steps + 1], a sampler and its options, the cfg scale, and a text that says where they are from."""

    sigmas: Tensor
    sampler: str
    sampler_options: dict[str, float]
    cfg: float
    explanation: str


def make_recipe(
    model: ModelFacts,
    preset: str = AUTO,
    steps: int | None = None,
    *,
    denoise: float = 1.0,
    mode: str = "snap",
    sigmas: Tensor | None = None,
    sampler: str | None = None,
    cfg: float | None = None,
    width: int = DEFAULT_SIZE,
    height: int = DEFAULT_SIZE,
    video: bool = False,
) -> Recipe:
    """The recipe for ``model``.

    preset: a key of the table or "auto" (the file's own metadata, else the family).  steps: None for the preset's own.
    denoise in (0, 1], mode: ``schedules.DENOISE_MODES``.  sigmas, sampler, cfg: override what the preset says.
    video: whether the latents have more than one frame.
    Raises ValueError for a preset of another family, steps it was not made for, denoise out of range, sigmas that no
    sampler can walk or that this model cannot have, and choices that nothing decides.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    base = _from_sigmas(model, preset, steps, sigmas, sampler, cfg) if sigmas is not None else None
    base = (
        base
        or _from_metadata(model, preset, steps)
        or _from_preset(model, preset, steps, sampler, width, height, video)
    )
    check_range(base.sigmas, model.table)
    levels = DENOISE_MODES[mode](base.sigmas, denoise, model.table)
    text = base.explanation
    if denoise < 1:
        listed = ", ".join(f"{level:.4g}" for level in levels.tolist())
        text += f"\nDenoise {denoise:g} ({mode}): {listed}"
    options = base.sampler_options if sampler in (None, base.sampler) else {}  # another sampler has other options
    return Recipe(levels, sampler or base.sampler, options, base.cfg if cfg is None else cfg, text)


def check_range(sigmas: Tensor, table: Tensor | None) -> None:
    """Raises ValueError when the first level is one that the model cannot have."""
    highest = 1.0 if table is None else table[-1].item()
    if sigmas[0] > highest * (1 + 1e-3):
        kind = "flow" if table is None else "discrete"
        raise ValueError(
            f"the noise levels start at {sigmas[0]:.4g}, but those of this {kind} model end at {highest:.4g}: the list "
            "is for another kind of model; choose a preset of this model's family"
        )


def _from_sigmas(
    model: ModelFacts, preset: str, steps: int | None, sigmas: Tensor, sampler: str | None, cfg: float | None
) -> Recipe:
    check_sigmas(sigmas)
    count = len(sigmas) - 1
    if steps is not None and steps != count:
        raise ValueError(f"SIGMAS has {count} steps but steps is {steps}: set steps to 0, or disconnect SIGMAS")
    text = f"SIGMAS as connected, {count} steps: " + ", ".join(f"{level:.4g}" for level in sigmas.tolist())
    if sampler is not None and cfg is not None:
        return Recipe(sigmas, sampler, {}, cfg, text)
    try:
        row = choose_row(model, preset, count)
    except ValueError as error:
        if sampler is None:
            raise ValueError(f"SIGMAS are connected, but nothing says which sampler: choose one ({error})") from None
        return Recipe(sigmas, sampler, {}, 1.0, text)
    return Recipe(sigmas, *_sampler(row, sampler), row.cfg_at(count), text)


def describe_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """The ``turbo_distill.*`` entries of a file's metadata, without the prefix; empty for other files."""
    return {key.removeprefix(NAMESPACE): value for key, value in metadata.items() if key.startswith(NAMESPACE)}


def student_levels(trained: list[float], steps: int | None = None) -> Tensor:
    """The grid of a student trained at ``trained`` levels for ``steps`` of them: evenly chosen where that works out,
    else the first ones. Raises ValueError for more steps than levels."""
    steps = len(trained) if steps is None else steps
    if not 1 <= steps <= len(trained):
        raise ValueError(f"this file was trained at {len(trained)} noise levels, so steps must be 1-{len(trained)}")
    even = len(trained) % steps == 0
    return explicit_sigmas(trained[:: len(trained) // steps] if even else trained[:steps])


def _from_metadata(model: ModelFacts, preset: str, steps: int | None) -> Recipe | None:
    described = describe_metadata(model.metadata)
    if preset != AUTO or "sigmas" not in described:
        return None
    sigmas = student_levels(json.loads(described["sigmas"]), steps)
    levels = ", ".join(f"{level:.4g}" for level in sigmas.tolist())
    sampler, cfg = described.get("sampler", "renoise"), float(described.get("cfg", 1.0))
    text = f"{len(sigmas) - 1} steps: {levels}\nsampler {sampler}; cfg {cfg:g}"
    options = json.loads(described.get("sampler_options", "{}"))
    text += f"\nSource: the file's own metadata ({described.get('method', '?')})"
    return Recipe(sigmas, sampler, options, cfg, text)


def _from_preset(
    model: ModelFacts, preset: str, steps: int | None, sampler: str | None, width: int, height: int, video: bool
) -> Recipe:
    row = choose_row(model, preset, steps)
    if video and not row.video:
        raise ValueError(
            f"the latents are a video but {row.title} is an image model; "
            "use an empty latent of one frame or a video preset"
        )
    process = cast(TimestepProcess, model.process) if row.grid["kind"] == "timesteps" else None
    sigmas = preset_sigmas(row, steps, process, width, height)
    count = len(sigmas) - 1
    text = explain(row, count, sigmas)
    return Recipe(sigmas, *_sampler(row, sampler), row.cfg_at(count), text)


def choose_row(model: ModelFacts, preset: str, steps: int | None) -> Preset:
    """The row ``preset``, or the one "auto" means for this family. Raises ValueError where it does not fit."""
    if preset == AUTO:
        if model.family is None:
            raise ValueError(
                "the model's family is not in the table of turbo models: choose a preset or connect SIGMAS"
            )
        return auto_preset(model.family, steps)
    row = find_preset(preset)
    if model.family is not None and model.family not in row.families:
        known = ", ".join(other.key for other in presets_of(model.family)) or "none; connect SIGMAS instead"
        raise ValueError(
            f"preset {row.key} is for {' or '.join(row.families)}, but the model is {model.family}; "
            f"presets for it: {known}"
        )
    return row


def _sampler(row: Preset, override: str | None) -> tuple[str, dict[str, float]]:
    """Name and options of the row's sampler, or of the one that replaces it."""
    sampler = override or row.sampler
    if sampler is None:
        raise ValueError(f"{row.title} needs a sampler of its own ({row.comfy}); choose a sampler to use another one")
    return sampler, row.sampler_options if sampler == row.sampler else {}
