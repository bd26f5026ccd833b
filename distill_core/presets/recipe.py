"""From a model, a choice and a step count to everything a sampler needs: levels, sampler, cfg, and why.

The nodes of ComfyUI and scripts share this; it knows a model only through `ModelFacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from ..diffusion.process import TimestepProcess
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import DENOISE_MODES, check_sigmas, explicit_sigmas, shift_sigmas, size_shift
from ..lora_files import NAMESPACE, parse_description
from ..models.families import take_the_same_loras
from .explain import explain
from .facts import ModelFacts
from .levels import DEFAULT_SIZE, preset_sigmas
from .origin import origin_notes
from .table import Preset, auto_preset, counted, find_preset, presets_of, spell

AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """sigmas [steps + 1], a sampler and its options, the cfg scale, a text that says where they are from, and warnings
    of a student that was made above another model or LoRA."""

    sigmas: Tensor
    sampler: str
    sampler_options: dict[str, float]
    cfg: float
    explanation: str
    warnings: tuple[str, ...] = ()


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
    width: int | None = None,
    height: int | None = None,
    video: bool = False,
) -> Recipe:
    """The recipe for ``model``.

    preset: a key of the table or "auto" (the file's own metadata, else the family).  steps: None for the preset's own.
    denoise in (0, 1], mode: ``schedules.DENOISE_MODES``.  sigmas, sampler, cfg: override what the preset says.
    width, height: of the picture in pixels; where they are not said, a preset takes `DEFAULT_SIZE`, and a student its
    reference.  video: whether the latents have more than one frame.
    Raises ValueError for a preset of another family, steps it was not made for, denoise out of range, sigmas that no
    sampler can walk or that this model cannot have, and choices that nothing decides.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    base = _from_sigmas(model, preset, steps, sigmas, sampler, cfg) if sigmas is not None else None
    base = (
        base
        or _from_metadata(model, preset, steps, width, height)
        or _from_preset(model, preset, steps, sampler, width or DEFAULT_SIZE, height or DEFAULT_SIZE, video)
    )
    check_range(base.sigmas, model.table)
    base = replace(base, explanation="\n".join([base.explanation, *unfit_loras(model)]))
    levels = DENOISE_MODES[mode](base.sigmas, denoise, model.table)
    text = base.explanation
    if denoise < 1:
        listed = ", ".join(f"{level:.4g}" for level in levels.tolist())
        text += f"\nDenoise {denoise:g} ({mode}): {listed}"
    options = base.sampler_options if sampler in (None, base.sampler) else {}  # another sampler has other options
    text = "\n".join([text, *(f"Warning: {warning}." for warning in base.warnings)])
    return Recipe(levels, sampler or base.sampler, options, base.cfg if cfg is None else cfg, text, base.warnings)


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
    sigmas = check_sigmas(sigmas).float()
    count = len(sigmas) - 1
    if steps is not None and steps != count:
        raise ValueError(f"SIGMAS has {counted(count)} but steps is {steps}: set steps to 0, or disconnect SIGMAS")
    text = f"SIGMAS as connected, {counted(count)}: " + ", ".join(f"{level:.4g}" for level in sigmas.tolist())
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


def student_levels(trained: list[float], steps: int | None = None, shift: float = 1.0) -> Tensor:
    """The grid of a student trained at ``trained`` levels for ``steps`` of them: evenly chosen where that works out,
    else the first ones; shifted (`shift_of`). Raises ValueError for more steps than levels."""
    steps = len(trained) if steps is None else steps
    if not 1 <= steps <= len(trained):
        raise ValueError(f"this file was trained at {len(trained)} noise levels, so steps must be 1-{len(trained)}")
    even = len(trained) % steps == 0
    return shift_sigmas(
        explicit_sigmas(trained[:: len(trained) // steps] if even else trained[:steps]), shift_alpha=shift
    )


def shift_of(description: Mapping[str, Any], width: int | None, height: int | None) -> float:
    """The factor that shifts a student's levels for a picture of that many pixels; 1 where they are those of any size,
    or the size is not known.

    description: of its file, as `parse_description` gives it.
    """
    reference = description.get("reference_pixels")
    return size_shift(width * height, reference) if reference and width and height else 1.0


def own_description(model: ModelFacts) -> tuple[dict[str, str], str]:
    """What the model's files say of how it was distilled, and which file; empty where none does.

    A LoRA counts only if the model has taken up layers of it and the file is of the model's family.
    Raises ValueError where several say different things.
    """
    if rivals := rival_loras(model):
        names = " and ".join(rivals)
        raise ValueError(f"{names} {RIVALS}: choose a preset, connect SIGMAS, or leave one of them out")
    fitting = _fitting_loras(model)
    if fitting:
        return fitting[0]
    checkpoint = describe_metadata(model.metadata)
    fits = "sigmas" in checkpoint and is_of_family(checkpoint, model.family)
    return (checkpoint, "the file's own metadata") if fits else ({}, "")


RIVALS = "are both on this model, and they were trained for different noise levels or samplers"


def rival_loras(model: ModelFacts) -> list[str]:
    """The names of turbo LoRAs on the model that say different things; empty where all agree."""
    different = {own["sigmas"] + own.get("sampler", ""): name for own, name in _fitting_loras(model)}
    return list(different.values()) if len(different) > 1 else []


def _fitting_loras(model: ModelFacts) -> list[tuple[dict[str, str], str]]:
    described = [(describe_metadata(lora.metadata), lora) for lora in model.loras if lora.layers]
    return [(own, lora.name) for own, lora in described if "sigmas" in own and is_of_family(own, model.family)]


def unfit_loras(model: ModelFacts) -> list[str]:
    """Why a turbo LoRA's description is not followed, one sentence each."""
    reasons = []
    for lora in model.loras:
        described = describe_metadata(lora.metadata)
        if not is_of_family(described, model.family):
            reasons.append(f"{lora.name} was made for {described['family']}, and this model is {model.family}")
        elif not lora.layers:
            reasons.append(f"no layer of {lora.name} fits this model, so it does nothing")
    return reasons


def is_of_family(described: dict[str, str], family: str | None) -> bool:
    """Whether a file with this description is for models of ``family``, as far as it says."""
    return family is None or take_the_same_loras(described.get("family", ""), family)


def _from_metadata(
    model: ModelFacts, preset: str, steps: int | None, width: int | None, height: int | None
) -> Recipe | None:
    described, file = own_description(model) if preset == AUTO else ({}, "")
    if "sigmas" not in described:
        return None
    try:
        stored = parse_description(described)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; choose a preset, or train the LoRA again") from error
    shift = shift_of(stored, width, height)
    sigmas = student_levels(stored["sigmas"], steps, shift)
    levels = ", ".join(f"{level:.4g}" for level in sigmas.tolist())
    sampler, cfg = described.get("sampler", "renoise"), float(stored.get("cfg", 1.0))
    if sampler not in SAMPLERS:
        raise ValueError(f"{file} asks for the sampler {sampler!r}, which is not known; choose one, or a preset")
    text = f"{counted(len(sigmas) - 1)}: {levels}\nsampler {sampler}; cfg {cfg:g}"
    options = stored.get("sampler_options", {})
    if shift != 1:
        text += f"\nshifted by {shift:.4g} for {width} x {height} pixels, as it was trained"
    text += f"\nSource: {file} ({described.get('method', '?')})"
    return Recipe(sigmas, sampler, options, cfg, text, tuple(origin_warnings(model, described)))


def origin_warnings(model: ModelFacts, described: Mapping[str, str]) -> list[str]:
    """What is to be said of a model whose file was made above another one (`origin_notes`), if the host tells."""
    return origin_notes(described, model.base, model.layout, model.below) if model.base else []


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
    text = "\n".join([explain(row, count, sigmas), *_doubts(model, row, preset)])
    return Recipe(sigmas, *_sampler(row, sampler), row.cfg_at(count), text)


def _doubts(model: ModelFacts, row: Preset, preset: str) -> list[str]:
    """What speaks against a row or is only supposed: an absent LoRA, and the guess that "auto" is."""
    doubts = []
    if row.lora and model.strengths == ():
        doubts.append("WARNING: this preset is a LoRA, and no LoRA is on the model (unless it is merged into the file)")
    if preset == AUTO:
        doubts.append("Chosen by the model's family alone: nothing on this model says how it was distilled")
        others = [other for other in presets_of(model.family, model.guidance_embedded) if other != row and other.known]
        named = ", ".join(f"{other.key} ({spell(other.steps)} steps)" for other in others if not other.part)
        if named:
            doubts[-1] += f"; the family also has {named}"
    return doubts


def choose_row(model: ModelFacts, preset: str, steps: int | None) -> Preset:
    """The row ``preset``, or the one "auto" means for this family. Raises ValueError where it does not fit."""
    if preset == AUTO:
        try:
            if model.family is None:
                raise ValueError("the model's family is not in the table: choose a preset or connect SIGMAS")
            return auto_preset(model.family, steps, model.guidance_embedded)
        except ValueError as error:
            raise ValueError(". ".join([str(error), *unfit_loras(model)])) from None
    row = find_preset(preset)
    if model.family is not None and model.family not in row.families:
        known = ", ".join(other.key for other in presets_of(model.family)) or "none; connect SIGMAS instead"
        raise ValueError(
            f"preset {row.key} is for {' or '.join(row.families)}, but the model is {model.family}; "
            f"presets for it: {known}"
        )
    if row.known and (row.grid["kind"] == "timesteps") == (model.table is None):
        kinds = ("flow", "discrete") if model.table is None else ("discrete", "flow")
        raise ValueError(f"preset {row.key} is for {kinds[1]} models, but this is a {kinds[0]} model; choose another")
    return row


def _sampler(row: Preset, override: str | None) -> tuple[str, dict[str, float]]:
    """Name and options of the row's sampler, or of the one that replaces it."""
    sampler = override or row.sampler
    if sampler is None:
        raise ValueError(f"{row.title} needs a sampler of its own ({row.comfy}); choose a sampler to use another one")
    return sampler, row.sampler_options if sampler == row.sampler else {}
