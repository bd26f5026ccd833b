"""What a turbo model is to keep: its own samples of some prompts, with the states that it visits on the way.

They are made as the turbo is used: at its own levels, with its own sampler and guidance. A student that answers like
the turbo on these states makes the same pictures of these prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.samplers import sample
from ..diffusion.schedules import explicit_sigmas
from ..models.denoiser import Cond, Guided
from ..settings import SEED_MAX, Checked, setting
from .cache import CacheConfig, write_shards
from .shards import Progress

PURPOSE = "kept"  # names the stream of its noise, which no evaluation draws
ASSORTED = Path(__file__).parents[1] / "assets" / "prompts" / "assorted.txt"  # prompts that come with the pack


@dataclass(frozen=True)
class KeptConfig(Checked):
    """The turbo's own samples that a tuned turbo is to keep, and a training adapter learns from."""

    prompts: str = setting(
        "",
        "A text file with one prompt a line that a tuned turbo is to keep. Empty: the 124 prompts that come with the "
        "project; for the mini model its class names.",
    )
    count: int = setting(256, "Number of samples; they take the prompts in turn.", low=1, high=10**6)
    share: float = setting(
        0.35, 'Part of the batches that are of them, with method = "tune"; the others are of --data.', above=0, below=1
    )
    batch_size: int = setting(8, "Samples that are made at once; lower it when memory runs out.", low=1, high=4096)
    seed: int = setting(0, "Seed of their noise.", low=0, high=SEED_MAX)


def kept_config(levels: Sequence[float], count: int, size: tuple[int, int], **settings: float) -> CacheConfig:
    """How ``count`` samples of latents [C, *size] are made at a turbo's levels (highest first, without the final 0).

    settings: others of `CacheConfig`, such as guidance, seed and batch_size.
    """
    chosen = {"guidance": 1.0, **settings}
    return CacheConfig(count=count, steps=len(levels), sizes=(size,), state_sigmas=tuple(levels), **chosen)  # type: ignore[arg-type]


def cache_kept(
    turbo: Guided,
    conds: Cond,
    channels: int,
    config: CacheConfig,
    folder: str | Path,
    *,
    sampler: str,
    sampler_options: Mapping[str, float] | None = None,
    description: dict | None = None,
) -> Iterator[Progress]:
    """Sample the turbo and write the shards, as `cache.cache_latents` does: a stopped run goes on where it was.

    Item i takes row i mod len(conds) and noise of its own.  config: of `kept_config`.  description: anything JSON that
    must agree on going on, e.g. the base and the prompts. Raises ValueError when the folder holds another dataset or
    a latent is not finite.
    """
    options = dict(sampler_options or {})

    def make(items: Sequence[int], shard: int) -> dict[str, Tensor]:
        shape = (channels, *config.sizes[shard % len(config.sizes)])
        return sample_kept(turbo, conds[[i % len(conds) for i in items]], shape, config, items, sampler, options)

    told = kept_description(config, sampler, options)
    return write_shards(make, turbo.uncond, turbo.scale, config, folder, {**told, **(description or {})})


def kept_description(config: CacheConfig, sampler: str, options: Mapping[str, float]) -> dict:
    """What the manifest of a kept dataset says beside its settings."""
    return {"sigmas": [*config.state_sigmas, 0.0], "kept": {"sampler": sampler, "options": dict(options)}}


@torch.no_grad()
def sample_kept(
    turbo: Guided,
    cond: Cond,
    shape: Sequence[int],
    config: CacheConfig,
    items: Sequence[int],
    sampler: str,
    options: Mapping[str, float],
) -> dict[str, Tensor]:
    """A shard's tensors for some items: latents [B, *shape], states [B, K, *shape] at the K levels, and the Cond's."""
    states: list[Tensor] = []
    latents = sample(
        turbo,
        turbo.process,
        explicit_sigmas(config.state_sigmas),
        cond,
        shape,
        seed=config.seed,
        items=items,
        sampler=sampler,
        purpose=PURPOSE,
        callback=lambda step: states.append(step["x"]),
        **options,  # type: ignore[arg-type]  # numbers
    )
    return {"latents": latents, "states": torch.stack(states, dim=1), **cond.tensors()}
