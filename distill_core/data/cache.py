"""Making a dataset: latents sampled from the teacher, written in shards; and whether its pairs are the teacher's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.noise import ItemNoise
from ..diffusion.process import NoiseProcess
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import grid_sigmas, same_level, with_levels
from ..files import DTYPES, load_tensors, save_json, save_tensors
from ..models.denoiser import Cond, Guided
from ..settings import setting
from .dataset import LatentDataset


@dataclass(frozen=True)
class CacheConfig:
    """How the teacher's latents are made."""

    count: int = setting(4096, "Number of latents to make; they take the prompts in turn.")
    steps: int = setting(25, "Steps the teacher takes for each latent, with the Euler sampler.")
    guidance: float = setting(5.0, "Classifier-free guidance scale of the teacher, the same at every step; 1 for none.")
    sizes: tuple[tuple[int, int], ...] = setting(
        ((64, 64),),
        "Sizes [height, width] of the latents, an eighth of the picture's in pixels; the files of the dataset take "
        "them in turn.",
    )
    state_sigmas: tuple[float, ...] = setting(
        (),
        "Noise levels at which the teacher's path is stored as well, highest first; the pairs term needs them. The "
        "model's highest level (1 for flow models, 14.6146 for SD 1.5 and SDXL) stores the noise each latent began as.",
    )
    shard_size: int = setting(256, "Latents in one file of the dataset.")
    batch_size: int = setting(64, "Latents that are made at once; lower it when memory runs out.")
    seed: int = setting(0, "Seed of the noise that the latents begin as.")
    dtype: str = setting("float32", 'Number format of the files: "float32", "float16" or "bfloat16".')

    def __post_init__(self) -> None:
        if self.count < 1 or self.shard_size < 1 or self.batch_size < 1 or self.steps < 1:
            raise ValueError("count, steps, shard_size and batch_size must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, not {self.dtype!r}")
        if not self.sizes:
            raise ValueError("sizes must list at least one latent size [H, W]")


# Items done, items in all, and the latents of the batch that is finished (None where they were already there).
Progress = tuple[int, int, Tensor | None]


def teacher_grid(process: NoiseProcess, config: CacheConfig) -> Tensor:
    """The teacher's sigmas with every level in ``state_sigmas`` among them."""
    return with_levels(grid_sigmas(process, config.steps), config.state_sigmas)


def cache_latents(
    teacher: Guided,
    conds: Cond,
    channels: int,
    config: CacheConfig,
    folder: str | Path,
    description: dict | None = None,
) -> Iterator[Progress]:
    """Sample the teacher and write the shards.

    Item i takes row i mod len(conds) and noise seeded by (seed, i). Shards that are already there are kept, so a
    stopped run goes on where it was. description: anything JSON that must agree then, e.g. the base and the prompts.
    Raises ValueError when the folder holds another dataset or a latent is not finite.
    """

    def make(items: range, shard: int) -> dict[str, Tensor]:
        shape = (channels, *config.sizes[shard % len(config.sizes)])
        return _sample_batch(teacher, conds[[i % len(conds) for i in items]], shape, config, items)

    return write_shards(make, teacher.uncond, teacher.scale, config, folder, description)


def write_shards(
    make: Callable[[range, int], dict[str, Tensor]],
    uncond: Cond,
    guidance: float,
    config: CacheConfig,
    folder: str | Path,
    description: dict | None = None,
) -> Iterator[Progress]:
    """`cache_latents` with any source: ``make(items, shard)`` gives the items' tensors
    (latents, those of their Cond, states).

    All items of a shard must have the same shapes. Errors as for `cache_latents`.
    """
    folder = Path(folder)
    manifest = {"config": _plain(asdict(config)), "guidance": guidance, "state_sigmas": list(config.state_sigmas)}
    write_manifest(folder, manifest | _plain(description or {}))
    save_tensors(folder / "uncond.safetensors", uncond.tensors())
    for shard, start in enumerate(range(0, config.count, config.shard_size)):
        path = folder / f"shard-{shard:05d}.safetensors"
        items = range(start, min(start + config.shard_size, config.count))
        if path.exists():
            load_tensors(path)  # a damaged shard is named now, not in the middle of a training run
            yield items.stop, config.count, None
            continue
        parts = []
        for first in range(0, len(items), config.batch_size):
            batch = items[first : first + config.batch_size]
            part = make(batch, shard)
            if not torch.isfinite(part["latents"]).all():
                raise ValueError(f"the teacher gave non-finite latents for items {batch.start}-{batch.stop - 1}")
            parts.append(part)
            yield batch.stop, config.count, part["latents"]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        dtype = DTYPES[config.dtype]
        save_tensors(
            path, {k: v.to(dtype) for k, v in tensors.items()}, {"state_sigmas": json.dumps(config.state_sigmas)}
        )


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


def _plain(value: Any) -> Any:
    """Through JSON, so that tuples compare equal to what a file gives back."""
    return json.loads(json.dumps(value))


def write_manifest(folder: Path, manifest: dict) -> None:
    """Say in the folder what dataset it holds. Raises ValueError when it already holds another one."""
    path = folder / "dataset.json"
    if path.exists() and json.loads(path.read_text()) != manifest:
        raise ValueError(
            f"{folder} holds a dataset made with other settings, prompts or model; delete it or choose another folder"
        )
    save_json(path, manifest)


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
    return teacher_grid(process, replace(CacheConfig(**known), state_sigmas=dataset.state_sigmas))


@torch.no_grad()
def check_pairs(dataset: LatentDataset, teacher: Guided, tolerance: float = 0.05) -> float:
    """Re-run the path of the first item from its stored noise; returns the relative RMS error of the latent.

    Raises ValueError when no noise is stored, or when the stored latent is not where the teacher's deterministic solver
    ends (another teacher, guidance or number of steps, or a sampler that adds noise): such pairs cannot be learnt.
    """
    grid = stored_grid(dataset, teacher.process)
    top = grid[0].item()
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
