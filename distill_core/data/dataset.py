"""Cached training data: teacher latents, their conditioning and, if wanted, states of the ODE path that made each.

A dataset is a folder of safetensors shards. A shard holds one latent size and one number of text tokens (a
bucket); rows are read through the memory map when a batch needs them. ``dataset.json`` records how they were made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..devices import upload
from ..digests import file_digest
from ..files import check_finite, load_tensors, read_json
from ..models.denoiser import Cond
from ..models.items import EXTRA, conditions_in, of_file, wrong_shape, wrong_values
from .epochs import BatchSize, Epochs, Item
from .shards import shard_files


@dataclass(frozen=True)
class Batch:
    """latents [B, C, H, W], cond of B rows, and states [B, K, C, H, W] of the teacher's path at K ``state_sigmas``.

    same: for each row the first row that has its latent: a bucket smaller than a batch is repeated to fill one. Empty:
    all differ.  beside: per-item tensors that no network is told (`items.ITEM_TENSORS`); what one is, is in cond.
    """

    latents: Tensor
    cond: Cond
    states: Tensor | None = None
    state_sigmas: tuple[float, ...] = ()
    same: tuple[int, ...] = ()
    beside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> tuple[int, ...]:
        """For each row the first one that has its latent."""
        return self.same or tuple(range(len(self.latents)))

    @property
    def distinct(self) -> list[int]:
        """The rows that may enter a statistic: each latent once."""
        return [row for row, first in enumerate(self.first) if row == first]

    def to(self, device: torch.device | str) -> Batch:
        states = None if self.states is None else upload(self.states, device)
        beside = {name: upload(value, device) for name, value in self.beside.items()}
        latents, cond = upload(self.latents, device), self.cond.to(device)
        return replace(self, latents=latents, cond=cond, states=states, beside=beside)


class LatentDataset:
    """A cached dataset, opened for reading.

    Raises ValueError for a folder without shards, a truncated shard, mismatched counts, latents that are not 4-D, or
    per-item tensors of other shapes than declared.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = shard_files(self.folder)
        if not self.paths:
            raise ValueError(f"no shards in {self.folder}; make them with the `cache` command")
        self.files = [_open_shard(path) for path in self.paths]
        self.members: list[LatentDataset] = [self]  # several where datasets are mixed
        self.state_sigmas = _state_sigmas(self.paths[0], self.files[0])
        # By C, H, W, number of text tokens, and which tensors of what shapes there are: what can be stacked into one
        # batch.
        self.buckets: dict[tuple, list[Item]] = defaultdict(list)
        for index, file in enumerate(self.files):
            count, *shape = file.get_slice("latents").get_shape()
            shapes = {name: tuple(file.get_slice(name).get_shape()[1:]) for name in sorted(file.keys())}
            self.buckets[(*shape, shapes["context"][0], *shapes.items())] += [(index, row) for row in range(count)]
        self.epochs = Epochs(self.buckets)

    def part(self, keep: Callable[[Item], bool]) -> LatentDataset:
        """The same dataset with some of its items only."""
        part = copy(self)
        part.buckets = defaultdict(list)
        for key, bucket in self.buckets.items():
            if kept := [item for item in bucket if keep(item)]:
                part.buckets[key] = kept
        part.epochs = Epochs(part.buckets)
        return part

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Latent shapes [C, H, W] of the buckets, that of the most items first."""
        counts: Counter[tuple[int, ...]] = Counter()
        for bucket, items in self.buckets.items():
            counts[bucket[:3]] += len(items)
        return [shape for shape, _ in counts.most_common()]

    @property
    def conditions(self) -> list[str]:
        """Names of the per-item tensors that networks are told (`items.ITEM_TENSORS`)."""
        return conditions_in({name for file in self.files for name in file.keys()})

    def span(self, name: str) -> tuple[float, float] | None:
        """The lowest and the highest of a number that items have (`items.ITEM_TENSORS`), or between which they were
        drawn; None where some have none."""
        key = EXTRA + name
        if any(key not in file.keys() for file in self.files):
            return None
        values = torch.cat([file.get_tensor(key).float() for file in self.files])
        drawn = self.manifest().get("config", {}).get(name) or ()  # the ends of what was drawn from, evenly
        return min(values.min().item(), *drawn), max(values.max().item(), *drawn)

    @property
    def largest(self) -> list[Item]:
        """The items of the largest bucket, in order."""
        return max(self.buckets.values(), key=len)

    def manifest(self) -> dict:
        """How the latents were made (``dataset.json``)."""
        path = self.folder / "dataset.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: it says how the latents were made; cache the dataset again")
        manifest = read_json(path, "cache the dataset again in a new folder")
        if not isinstance(manifest.get("guidance"), int | float) or not math.isfinite(manifest["guidance"]):
            raise ValueError(f"{path} is damaged: guidance is no number; cache the dataset again in a new folder")
        return manifest

    def digest(self) -> str:
        """A hash of how the latents were made and of samples of every file, to recognise the dataset."""
        manifest = json.dumps(self.manifest(), sort_keys=True)
        files = [file_digest(path) for path in (*self.paths, self.folder / "uncond.safetensors")]
        return hashlib.sha256("".join([manifest, *files]).encode()).hexdigest()[:16]

    def uncond(self) -> Cond:
        """The empty conditioning (one row) that the teacher was guided away from."""
        path = self.folder / "uncond.safetensors"
        tensors, _ = load_tensors(path)
        check_finite(tensors, path, "delete it and cache the dataset again")
        try:
            return Cond.from_tensors(tensors)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; delete it and cache the dataset again") from error

    def batch(self, number: int, size: BatchSize, seed: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """Batch ``number`` of an endless shuffled stream; a batch has one latent size and one number of text tokens.

        Only (seed, number, size) decide what is in it.  part: (i, n) for the i-th of n equal parts, that of a process.
        Raises ValueError for latents that are not finite.
        """
        items = self.items_of(number, size, seed)
        share = len(items) // part[1]
        return self.read(items[part[0] * share : (part[0] + 1) * share])

    def items_of(self, number: int, size: BatchSize, seed: int) -> list[Item]:
        """The items of batch ``number``."""
        return self.epochs.batch(number, size, seed)

    def read(self, items: Sequence[Item]) -> Batch:
        """The items, in that order."""
        names = self.files[items[0][0]].keys()
        tensors = {}
        for name in names:
            slices = [self.files[shard].get_slice(name)[row : row + 1] for shard, row in items]
            tensors[name] = torch.cat(slices).float()
        for name, values in tensors.items():
            if not torch.isfinite(values).all():
                bad = next(item for item, row in zip(items, values, strict=True) if not torch.isfinite(row).all())
                raise ValueError(
                    f"{self.paths[bad[0]]} has non-finite {name} in row {bad[1]}; delete the shard and cache again"
                )
        if wrong := wrong_values(tensors):
            raise ValueError(f"{self.paths[items[0][0]]} is damaged: {wrong}; delete the shard and cache again")
        latents, states = tensors.pop("latents"), tensors.pop("states", None)
        beside = {name: tensors.pop(name) for name in names if of_file(name) and not name.startswith(EXTRA)}
        return Batch(latents, Cond.from_tensors(tensors), states, self.state_sigmas, same_rows(latents), beside)


class ItemConds:
    """What belongs to items of a dataset but for their latents, a row each, read when it is asked for."""

    def __init__(self, dataset: LatentDataset, items: Sequence[Item], device: torch.device | str = "cpu") -> None:
        self.dataset, self.items, self.device = dataset, items, device

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: Sequence[int]) -> Cond:
        return self.dataset.read([self.items[row] for row in rows]).cond.to(self.device)


def same_rows(latents: Tensor) -> tuple[int, ...]:
    """For each row of a batch on the CPU the first that equals it: the same item, or a picture twice in a dataset."""
    digests = [hashlib.sha256(latent.numpy().tobytes()).digest() for latent in latents]
    return tuple(map(digests.index, digests))


def _state_sigmas(path: Path, file) -> tuple[float, ...]:
    """The levels of a shard's states, as its metadata say; states are in the order of the path, the highest first."""
    said = (file.metadata() or {}).get("state_sigmas", "[]")
    try:
        sigmas = tuple(sorted(map(float, json.loads(said)), reverse=True))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is damaged: state_sigmas is {said!r:.40}, not a list of numbers; delete it and run `cache` again"
        ) from None
    kept = file.get_slice("states").get_shape()[1:2] if "states" in file.keys() else [0]
    if kept != [len(sigmas)]:
        raise ValueError(
            f"{path} is damaged: it names {len(sigmas)} noise levels and holds states of {kept[0] if kept else 0}; "
            "delete it and run `cache` again"
        )
    return sigmas


def _open_shard(path: Path):
    try:
        file = safe_open(path, "pt")
        names = file.keys()
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file; delete it and run `cache` again") from error
    if "latents" not in shapes or "context" not in shapes:
        raise ValueError(f"{path} is not a shard of this project: it needs tensors named latents and context")
    if len(shapes["latents"]) != 4:
        raise ValueError(f"{path}: latents must be [N, C, H, W] (images), got {shapes['latents']}")
    if len(shapes["context"]) != 3:
        raise ValueError(
            f"{path}: context must be [N, tokens, width], got {shapes['context']}; cache the dataset again"
        )
    counts = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: latents and conditioning differ in count: {counts}; cache the dataset again")
    if not counts["latents"]:
        raise ValueError(f"{path} is a shard without items; delete it and run `cache` again")
    if wrong := wrong_shape(shapes):
        raise ValueError(f"{path}: {wrong}; cache the dataset again")
    return file
