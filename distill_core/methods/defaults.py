"""What a new student is trained for: its noise levels for a number of steps, and starting values per family.

The values come from public recipes; on large models we have not run them (README).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..diffusion.process import NoiseProcess
from ..diffusion.schedules import grid_sigmas
from ..models.families import FAMILIES
from ..presets.facts import ModelFacts
from ..presets.recipe import AUTO, make_recipe, own_description
from ..settings import Checked, setting

MOST_STEPS = 8
NO_PRESET = "none"


@dataclass(frozen=True)
class StartingValues(Checked):
    """Values that a new training run of a model family starts from."""

    rank: int = setting(64, "Rank of the student's LoRA.")
    student_lr: float = setting(1e-5, "Learning rate of a student that is a LoRA.")
    full_lr: float = setting(2e-6, "Learning rate of a student all of whose weights are trained.")
    discriminator_lr: float = setting(1e-4, "Learning rate of the discriminator.")
    renoise_mean: float = setting(1.0, "Mean m of the logit-normal noise level of LADD's discriminator.")
    renoise_std: float = setting(1.0, "Standard deviation s of that noise level.")


# LADD uses (m, s) = (1, 1) at 1024 px (section 4); a latent of 512 px has a quarter of the pixels, so noise hides its
# layout at a lower level (SD3, eq. 23), which is what m = .5 answers. Rates: Flash Diffusion (LoRA), Z-Image
# trainers; all weights: SANA-Sprint and FastVideo train them at 2e-6, NITRO at 1e-6.
# ADD and Diffusion2GAN do not say theirs and take the same; Diffusion2GAN's network learns at a tenth of its heads'.
STARTING_VALUES = {
    "sd15": StartingValues(renoise_mean=0.5),
    "sd21": StartingValues(renoise_mean=0.5),
    "wan": StartingValues(renoise_mean=1.5),
}


def starting_values(family: str | None) -> StartingValues:
    """Starting values for a family of the presets' table (None or another family: those of LADD)."""
    return STARTING_VALUES.get(family or "", StartingValues())


def levels_for(process, steps: int) -> tuple[float, ...]:
    """Noise levels of a new student, highest first: the process' own grid without the final 0 (LADD: 1, .75, .5, .25).

    Raises ValueError unless steps is in 1-8.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"a student is trained for 1-{MOST_STEPS} steps, not {steps}")
    return tuple(grid_sigmas(process, steps)[:-1].tolist())


def preset_levels(facts: ModelFacts, preset: str, steps: int) -> tuple[tuple[float, ...], str, dict[str, float]]:
    """Levels, sampler and sampler options of a turbo model in the table, to train a student that is used like it.

    Raises ValueError for a preset of another family, or one that was not made for so many steps.
    """
    recipe = make_recipe(facts, preset, steps)
    return tuple(recipe.sigmas[:-1].tolist()), recipe.sampler, recipe.sampler_options


def auto_levels(
    facts: ModelFacts, process: NoiseProcess, steps: int
) -> tuple[tuple[float, ...], str, dict[str, float], str]:
    """Levels, sampler and its options of a new student, and why these.

    Those of the model itself if it is a turbo: its file says so, or its family has no other models. Else, and where it
    has not that many levels, evenly spaced ones. Raises ValueError for turbo LoRAs that contradict each other.
    """
    described, file = own_description(facts)
    even, none = levels_for(process, steps), "evenly spaced levels"
    if facts.family is not None and FAMILIES[facts.family].all_turbo:
        file = file or FAMILIES[facts.family].title
    if not file:
        return even, "renoise", {}, none
    try:
        recipe = make_recipe(facts, AUTO, steps)
    except ValueError as error:
        return even, "renoise", {}, f"the model is a turbo, but not for this: {error}; so {none}"
    why = "; ".join([f"the model is a turbo: the levels of {file}", *recipe.warnings])
    return tuple(recipe.sigmas[:-1].tolist()), recipe.sampler, recipe.sampler_options, why


def probabilities_for(count: int) -> tuple[float, ...]:
    """How often each of ``count`` levels is drawn: the first, from pure noise, about twice as often as each other."""
    first = 1.0 if count == 1 else max(0.4, 1 / count)
    return (first, *[(1 - first) / (count - 1)] * (count - 1)) if count > 1 else (1.0,)
