"""Pairs of a chosen and a rejected picture of one text, for preference tuning: ranked samples, or picture files.

An item's latent is the chosen one, and its per-item tensor `rejected` the other (`models.items`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..diffusion.samplers import sample
from ..diffusion.schedules import grid_sigmas
from ..models.denoiser import Cond, Guided
from ..models.items import REJECTED
from ..settings import Checked, setting
from .cache import CacheConfig, write_shards
from .dataset import ItemConds
from .pictures import Picture, PictureConfig, survey, with_partners
from .shards import Progress

TRIES = 20  # how often a prompt is sampled anew before its samples count as all alike
Draw = Callable[[Sequence[int], str], Tensor]  # items, and the stream of their noise -> a sample of each [B, C, H, W]
Score = Callable[[Tensor, Sequence[int]], Tensor]  # latents [B, C, H, W], and the items they are of -> [B]


@dataclass(frozen=True)
class PreferenceConfig(Checked):
    """Pairs for method = "dpo", of the model's own samples."""

    samples: int = setting(
        0,
        "`cache` makes pairs: of so many samples of a prompt, at least 2, the best becomes the chosen and the worst "
        "the rejected picture of an item. 0: ordinary latents, one for an item.",
        low=0,
        high=1000,
    )
    scorer: str = setting(
        "classifier",
        'What ranks the samples: "classifier", a shipped model\'s own, or a Python file with a function '
        "score(images, prompts) that gives a number for each image [3, H, W] in [-1, 1], higher for the better.",
    )
    margin: float = setting(
        0.0,
        "By how much more the best sample must score than the worst. Where it does not, as in a tie, the prompt is "
        "sampled anew.",
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples == 1:
            raise ValueError("samples must be at least 2, of which one is the better, or 0 for ordinary latents")


def cache_pairs(
    teacher: Guided,
    conds: Cond | ItemConds,
    channels: int,
    config: CacheConfig,
    preference: PreferenceConfig,
    score: Score,
    folder: str | Path,
    description: dict,
) -> Iterator[Progress]:
    """Sample the teacher, rank its samples and write pairs, as `cache.cache_latents` writes latents.

    Item i takes row i mod len(conds) and noises of its own, so a stopped command goes on where it was.
    description: anything JSON that must agree then, the scorer above all.
    Raises ValueError when the folder holds another dataset, or the scorer cannot tell the samples of a prompt apart.
    """
    if config.state_sigmas:
        raise ValueError("[cache] state_sigmas are of the teacher's paths, and pairs have none: leave them out")
    process = teacher.process
    grid = grid_sigmas(process, config.steps)

    def make(items: Sequence[int], shard: int) -> dict[str, Tensor]:
        shape = (channels, *config.sizes[shard % len(config.sizes)])

        def draw(some: Sequence[int], stream: str) -> Tensor:
            cond = conds[[i % len(conds) for i in some]]
            return sample(
                teacher, process, grid, cond, shape, seed=config.seed, items=some, sampler="euler", purpose=stream
            )

        chosen, rejected = best_and_worst(draw, score, items, preference)
        return {"latents": chosen, REJECTED: rejected, **conds[[i % len(conds) for i in items]].tensors()}

    ranked = {"samples": preference.samples, "margin": preference.margin}
    told = {"preference": ranked, **description}
    return write_shards(make, teacher.uncond, teacher.scale, config, folder, told, [REJECTED])


def best_and_worst(
    draw: Draw, score: Score, items: Sequence[int], preference: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """The best and the worst sample of each item, [B, C, H, W] each.

    Where they lie too near each other by their scores, an item's samples are drawn anew.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    left = list(items)
    for turn in range(TRIES):
        drawn = [draw(left, f"sample {turn}.{which} of a pair") for which in range(preference.samples)]
        scores = torch.stack([score(latents, left) for latents in drawn])  # [samples, B]
        (high, best), (low, worst) = scores.max(0), scores.min(0)
        for place, item in enumerate(left):
            if high[place] - low[place] > preference.margin:
                found[item] = drawn[best[place]][place], drawn[worst[place]][place]
        left = [item for item in left if item not in found]
        if not left:
            chosen, rejected = zip(*(found[item] for item in items), strict=True)
            return torch.stack(chosen), torch.stack(rejected)
    raise ValueError(
        f"the scorer cannot tell the samples of item {left[0]} apart, which were drawn {TRIES} times: their scores "
        f"differ by at most {preference.margin:g}; lower [preference] margin, raise samples, or leave its prompt out"
    )


def with_rejected(pictures: Sequence[Picture], config: PictureConfig) -> tuple[list[Picture], dict[str, str]]:
    """The pictures that have a rejected one of the same name (whatever its suffix) and size in ``config.rejected``,
    with its path and digest, and the names of the others with the reason. The rejected folder may lie inside of theirs.

    Raises ValueError when none has one.
    """
    rejected, unread = survey(config.rejected, config)
    folder = Path(config.rejected).resolve()
    pictures = [picture for picture in pictures if folder not in picture.path.resolve().parents]
    by_name = {_stem(picture.name): picture for picture in rejected}
    reasons = {_stem(name): why for name, why in unread.items()}

    def rejected_of(picture: Picture) -> Picture | str:
        name = _stem(picture.name)
        if why := _fault(picture, by_name.get(name), reasons.get(name, "")):
            return why
        return picture._replace(rejected=by_name[name].path, rejected_digest=by_name[name].digest)

    if not pictures:
        raise ValueError(f"all pictures are rejected ones, of {config.rejected}: give the folder of the preferred ones")
    return with_partners(pictures, rejected_of, f"no picture has a rejected one in {config.rejected}")


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _fault(picture: Picture, other: Picture | None, why: str) -> str:
    if other is None:
        return f"has a rejected picture that cannot be read ({why})" if why else "has no rejected picture of its name"
    if other.size != picture.size:
        sizes = " and its rejected picture ".join(f"{width} x {height}" for width, height in (picture.size, other.size))
        return f"is {sizes}: crop both alike"
    return "is the same file as its rejected picture" if other.digest == picture.digest else ""
