"""Making a dataset: latents sampled from the teacher, written in shards; and whether its pairs are the teacher's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.noise import ItemNoise
from ..diffusion.process import NoiseProcess
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import grid_sigmas, same_level, with_levels
from ..files import DTYPES, alone_in
from ..models.denoiser import Cond, Guided
from ..settings import SEED_MAX, Checked, decisive, setting
from .dataset import ItemConds, LatentDataset
from .manifest import begin, plain
from .shards import Make, Progress, Shard, fill, held_items
from .strengths import check_span, draw_strengths

EMBEDDED_GUIDANCE = 3.5  # what FLUX.1 dev's publisher, diffusers and ComfyUI give


@dataclass(frozen=True)
class CacheConfig(Checked):
    """How the teacher's latents are made."""

    count: int = setting(4096, "Number of latents to make; they take the prompts in turn.", low=1, high=10**8)
    steps: int = setting(25, "Steps the teacher takes for each latent, with the Euler sampler.", low=1, high=1000)
    guidance: float = setting(
        5.0,
        "Classifier-free guidance scale of the teacher, the same at every step; 1 for none. Where this key is left "
        "out, a network with embedded guidance (FLUX.1 dev) takes 1.",
        low=0,
        high=100,
    )
    text_strength: tuple[float, ...] = setting(
        (),
        "Guidance scale of the text where the model edits a picture: one number, or the lowest and the highest of "
        "those that are drawn evenly for each item and stored with it. Empty: guidance.",
        low=0,
        high=100,
        added=True,
    )
    image_strength: tuple[float, ...] = setting(
        (),
        "Guidance scale of the picture that is edited, likewise; a third forward a step unless it is 1 "
        "(InstructPix2Pix equation 3). Empty: 1, so guidance is of the text alone.",
        low=0,
        high=100,
        added=True,
    )
    embedded_guidance: float = setting(
        EMBEDDED_GUIDANCE,
        "Guidance scale that a guidance-distilled network (FLUX.1 dev) is told as an input. It is stored with the "
        "latents, so the student learns at it and its file says it. Other networks have no such input.",
        low=0,
        high=100,
    )
    sizes: tuple[tuple[int, int], ...] = setting(
        ((64, 64),),
        "Sizes [height, width] of the latents, an eighth of the picture's in pixels; the files of the dataset take "
        "them in turn.",
        low=1,
        high=4096,
    )
    state_sigmas: tuple[float, ...] = setting(
        (),
        "Noise levels at which the teacher's path is stored as well, highest first; the pairs term needs them. The "
        "model's highest level (1 for flow models, 14.6146 for SD 1.5 and SDXL) stores the noise each latent began as.",
        above=0,
        high=1e6,
    )
    shard_size: int = setting(
        256, "Latents in one file of the dataset; one that is there keeps its own.", low=1, high=2**20
    )
    batch_size: int = setting(64, "Latents that are made at once; lower it when memory runs out.", low=1, high=4096)
    seed: int = setting(0, "Seed of the noise that the latents begin as.", low=0, high=SEED_MAX)
    dtype: str = setting("float32", 'Number format of the files: "float32", "float16" or "bfloat16".', choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sizes:
            raise ValueError("sizes must list at least one latent size [H, W]")
        if any(a <= b for a, b in pairwise(self.state_sigmas)):  # states are stored in the order of the path
            raise ValueError(f"state_sigmas must fall, the highest first, not {list(self.state_sigmas)}")
        for name in ("text_strength", "image_strength"):
            check_span(name, getattr(self, name))

    def strengths(self, items: Sequence[int]) -> dict[str, Tensor]:
        """Those of the items by their names in a conditioning (`strengths.draw_strengths`); none where none is set."""
        if not self.text_strength and not self.image_strength:
            return {}
        spans = self.text_strength or (self.guidance,), self.image_strength or (1.0,)
        return draw_strengths(*spans, self.seed, items, self.dtype)


def teacher_grid(process: NoiseProcess, config: CacheConfig) -> Tensor:
    """The teacher's sigmas with every level in ``state_sigmas`` among them."""
    grid, highest = grid_sigmas(process, config.steps), max(config.state_sigmas, default=0.0)
    if highest > grid[0] and not same_level(highest, grid[0]):
        raise ValueError(f"state_sigmas has {highest:g}, and the model's highest level is {grid[0].item():.6g}")
    return with_levels(grid, config.state_sigmas)


def cache_latents(
    teacher: Guided,
    conds: Cond | ItemConds,
    channels: int,
    config: CacheConfig,
    folder: str | Path,
    description: dict | None = None,
) -> Iterator[Progress]:
    """Sample the teacher and write the shards.

    Item i takes row i mod len(conds) and noise seeded by (seed, i). What is already there is kept, so a stopped run
    goes on where it was, and a larger count adds items. description: anything JSON that must agree then, e.g. the base
    and the prompts.  An item's strengths, where ``config`` sets some, are stored with it. Raises ValueError when the
    folder holds another dataset, or for what cannot be stored: a latent that is not finite, a per-item tensor that is
    not as declared.
    """

    def make(items: Sequence[int], shard: int) -> dict[str, Tensor]:
        shape = (channels, *config.sizes[shard % len(config.sizes)])
        cond = conds[[i % len(conds) for i in items]].with_items(config.strengths(items))
        return _sample_batch(teacher, cond, shape, config, items)

    return write_shards(make, teacher.uncond, teacher.scale, config, folder, description)


def write_shards(
    make: Make,
    uncond: Cond,
    guidance: float,
    config: CacheConfig,
    folder: str | Path,
    description: dict | None = None,
    more: Sequence[str] = (),
) -> Iterator[Progress]:
    """`cache_latents` with any source: ``make(items, shard)`` gives the items' tensors
    (latents, those of their Cond, states, others of `items.ITEM_TENSORS`).

    All items of a shard must have the same shapes.  more: names of further tensors that all of them must have.
    Errors as for `cache_latents`.
    """
    with alone_in(folder, "caching"):
        yield from _write_shards(make, uncond, guidance, config, Path(folder), description or {}, more)


def _write_shards(
    make: Make, uncond: Cond, guidance: float, config: CacheConfig, folder: Path, description: dict, more: Sequence[str]
) -> Iterator[Progress]:
    # What the network was told as guidance is said by who stores it with the items.
    settings = {name: value for name, value in decisive(config).items() if name != "embedded_guidance"}
    manifest = {"config": plain(settings), "guidance": guidance, "state_sigmas": list(config.state_sigmas)}

    def grow(there: dict) -> None:
        before = there["config"].get("count", 0)  # more than that is not of this dataset
        held = min(held_items(folder, shard_size_of(there, config)), max(config.count, before))
        there["config"]["count"] = max(config.count, held)
        if held > config.count:
            logging.warning("%s already holds %d latents, and count is %d: all are kept", folder, held, config.count)

    there = begin(folder, {**manifest, **description}, uncond, grown=grow)
    size, count = shard_size_of(there, config), there["config"]["count"]
    plan = [
        Shard(range(start, min(start + size, count)), config.sizes[number % len(config.sizes)])
        for number, start in enumerate(range(0, count, size))
    ]
    needs = ("latents", "context", *(["states"] if config.state_sigmas else []), *more)
    metadata = {"state_sigmas": json.dumps(config.state_sigmas)}
    yield from fill(folder, plan, make, config.batch_size, config.dtype, metadata, needs)


def shard_size_of(manifest: dict, config: CacheConfig) -> int:
    """Items of a shard: those of the dataset that is there, which decide the size and prompts of an item."""
    size = manifest["config"].get("shard_size")
    return size if isinstance(size, int) and size > 0 else config.shard_size


@torch.no_grad()
def _sample_batch(
    teacher: Guided, cond: Cond, shape: Sequence[int], config: CacheConfig, items: Sequence[int]
) -> dict[str, Tensor]:
    process, device = teacher.process, cond.device
    sigmas = teacher_grid(process, config)
    noise = ItemNoise(config.seed, items).normal(*shape).to(device)
    sigma = noise.new_full((len(noise),), sigmas[0].item())
    x = process.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
    states: list[Tensor] = []

    def keep_state(step: dict) -> None:
        if any(same_level(step["sigma"], wanted) for wanted in config.state_sigmas):
            states.append(step["x"])

    latents = SAMPLERS["euler"](teacher, x, sigmas, {"cond": cond}, keep_state, disable=True)
    stored = {"latents": latents, **cond.tensors()}
    if states:
        stored["states"] = torch.stack(states, dim=1)
    return stored


def groups_by_length(conds: Sequence[Cond]) -> list[list[int]]:
    """Indices of the prompts with equally many tokens: what can share a batch."""
    groups: dict[tuple, list[int]] = {}
    for index, cond in enumerate(conds):
        groups.setdefault(tuple(cond.context.shape[1:]), []).append(index)
    return list(groups.values())


def group_in_turn(turn: int, groups: Sequence[Sequence[int]]) -> Sequence[int]:
    """Whose turn it is, so that every group comes as often as its share of the prompts (Sainte-Lague's quotients)."""
    given = [0] * len(groups)
    for _ in range(turn + 1):
        chosen = max(range(len(groups)), key=lambda i: len(groups[i]) / (2 * given[i] + 1))
        given[chosen] += 1
    return groups[chosen]


def stored_grid(dataset: LatentDataset, process: NoiseProcess) -> Tensor:
    """The noise levels on which a dataset's latents were sampled; the process' own where its manifest does not say."""
    manifest = dataset.manifest()
    if "sigmas" in manifest:
        return torch.tensor(manifest["sigmas"])
    known = {k: v for k, v in manifest.get("config", {}).items() if k in CacheConfig.__annotations__}
    return teacher_grid(process, CacheConfig(**{**known, "state_sigmas": dataset.state_sigmas}))


@torch.no_grad()
def check_pairs(dataset: LatentDataset, teacher: Guided, tolerance: float = 0.05) -> float:
    """Re-run the path of the first item from its stored noise; returns the relative RMS error of the latent.

    Raises ValueError when no noise is stored, or when the stored latent is not where the teacher's deterministic solver
    ends (another teacher, guidance or number of steps, or a sampler that adds noise): such pairs cannot be learnt.
    """
    grid = stored_grid(dataset, teacher.process)
    top = grid[0].item()
    if not dataset.state_sigmas and "content" in dataset.manifest():
        raise ValueError(
            f"{dataset.folder} holds pictures, and pictures have no pairs: this method needs them in every batch. "
            "Train on the teacher's samples (`cache` with [cache] state_sigmas, or Teacher Latents), or choose LADD or "
            "ADD"
        )
    if not dataset.state_sigmas or not same_level(max(dataset.state_sigmas), top):
        raise ValueError(
            f"the dataset in {dataset.folder} does not store the noise its paths began in: pairs need state_sigmas "
            f"with the highest level, {top:.6g}; set [cache] state_sigmas and run `cache` again"
        )
    one = dataset.read(next(iter(dataset.buckets.values()))[:1]).to(teacher.uncond.device)
    assert one.states is not None  # there are state_sigmas
    x = one.states[:, dataset.state_sigmas.index(max(dataset.state_sigmas))]
    again = SAMPLERS["euler"](teacher, x, grid, {"cond": one.cond}, disable=True)
    error = ((again - one.latents).square().mean() / one.latents.square().mean()).sqrt().item()
    if not error <= tolerance:
        raise ValueError(
            f"the stored noise does not lead to the stored latent (relative error {error:.2f}): the dataset in "
            f"{dataset.folder} was made by a sampler that adds noise, or by another teacher, guidance or step count; "
            "`cache` again with this model"
        )
    return error
