"""What a turbo makes of the prompts that a tuning is to keep: a dataset of its own samples, made by the host.

It lies in output/turbo_distill/datasets under a name of its own, so that another run on the same turbo finds it there.
Another count is another dataset: one that grew would no longer be what an earlier run goes on with.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...distill_core.data.dataset import LatentDataset
from ...distill_core.data.kept import PURPOSE, kept_config, kept_description
from ...distill_core.data.mix import Mix, open_data
from ...distill_core.presets.recipe import Recipe
from .datasets import digest_of, sample_all, training_conditionings
from .folders import dataset_folder
from .items import check_told
from .pictures import encoded
from .prompts import SHIPPED, lines_of
from .sampling import recipe_sampler
from .teacher import HostTeacher

MOST_SIZES = 3  # of the own pictures at which kept prompts are sampled
SHARD_SIZE = 16  # items; a shard has one size and prompts of one length, and all are to have a turn soon


def kept_prompts(given: Sequence[list], clip) -> list[list]:
    """The prompts that are connected, or those that come with the pack, encoded. Raises ValueError for neither."""
    if given:
        return list(given)
    if clip is None:
        raise ValueError(
            "nothing says which prompts the turbo is to sample: connect clip, which encodes those that come with the "
            "pack, or prompts of your own"
        )
    return [encoded(clip, line) for line in dict.fromkeys(map(str.strip, lines_of(SHIPPED))) if line]


def empty_prompt(clip) -> list | None:
    """The conditioning of an empty text, None without a clip."""
    return None if clip is None else encoded(clip, "")


def usual_sizes(dataset: LatentDataset) -> tuple[tuple[int, int], ...]:
    """The latent sizes [H, W] that most items of a dataset have, the most frequent first."""
    return tuple((height, width) for _, height, width in dataset.shapes[:MOST_SIZES])


def picture_size(model, source: Path | Mix) -> tuple[int, int]:
    """Width and height in pixels that most pictures of a dataset have."""
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = usual_sizes(open_data(source))[0]
    return width * scale, height * scale


class TurboSamples:
    """The samples of a turbo MODEL by its own recipe, as a dataset that is made where it is not there yet.

    prompts: a CONDITIONING each; the samples take them in turn, and the latent sizes [H, W], too.
    empty: the conditioning of an empty text, None for zeros.  batch_size: of the sampling.
    states: whether the states on the way are stored, which the terms on kept items need.
    Raises ValueError for a turbo that is sampled with guidance where there is no empty prompt, and for one that is to
    fill or edit pictures where the prompts say of none.
    """

    def __init__(
        self,
        model,
        prompts: Sequence[list],
        recipe: Recipe,
        sizes: Sequence[tuple[int, int]],
        count: int,
        *,
        empty: list | None = None,
        batch_size: int = 4,
        states: bool = True,
        seed: int = 0,
    ) -> None:
        if recipe.cfg != 1 and empty is None:
            raise ValueError(
                f"this turbo is sampled at cfg {recipe.cfg:g}, which needs the empty prompt: connect clip, which "
                "encodes it"
            )
        self.model, self.prompts, self.recipe, self.empty = model, prompts, recipe, empty
        self.conds, self.uncond, made_by = training_conditionings(model, prompts, empty)
        check_told(model.model, self.conds)
        levels = recipe.sigmas[:-1].tolist()
        self.config = replace(
            kept_config(levels, count, tuple(sizes[0]), guidance=recipe.cfg, seed=seed),
            sizes=tuple(map(tuple, sizes)),
            state_sigmas=tuple(levels) if states else (),
            shard_size=SHARD_SIZE,
            batch_size=min(batch_size, SHARD_SIZE),
            dtype="float32" if model.model.get_dtype().itemsize == 4 else "bfloat16",
        )
        sampled = kept_description(self.config, recipe.sampler, recipe.sampler_options)
        self.description = {**sampled, **made_by, "prompts": digest_of(self.conds)}
        config = self.config
        told = [count, config.sizes, config.state_sigmas, config.seed, config.dtype, digest_of([self.uncond])]
        digest = hashlib.sha256(json.dumps([self.description, levels, *told]).encode()).hexdigest()
        self.folder = dataset_folder(f"kept_{digest[:12]}")

    @property
    def complete(self) -> bool:
        """Whether all are there."""
        try:
            return len(LatentDataset(self.folder)) >= self.config.count
        except ValueError:
            return False

    def make(self, say: Callable[[str], object] = logging.info) -> Path:
        """Sample what is missing; the folder. Item i has noise of its own, from (seed, i)."""
        teacher = HostTeacher(
            self.model,
            self.prompts,
            self.conds,
            negative=self.empty if self.recipe.cfg != 1 else None,
            cfg=self.recipe.cfg,
            sampler=partial(recipe_sampler, self.recipe),
            sigmas=self.recipe.sigmas,
            sizes=self.config.sizes,
            seed=self.config.seed,
            state_sigmas=self.config.state_sigmas,
            purpose=PURPOSE,
        )
        told = lambda text: say(f"the turbo's own samples: {text}")  # noqa: E731
        sample_all(teacher, self.uncond, self.config, self.folder, self.description, told)
        return self.folder
