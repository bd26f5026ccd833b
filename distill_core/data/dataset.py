"""Cached training data: teacher latents, their conditioning and, if wanted, states of the ODE path that made each.

A dataset is a folder of safetensors shards. A shard holds one latent size and one number of text tokens (a
bucket); rows are read through the memory map when a batch needs them. ``dataset.json`` records how they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..diffusion.noise import item_generator
from ..files import file_digest, load_tensors
from ..models.denoiser import Cond

Item = tuple[int, int]  # a latent with what belongs to it: (shard, row in the shard)


@dataclass(frozen=True)
class Batch:
    """latents [B, C, H, W], cond of B rows, and states [B, K, C, H, W] of the teacher's path at K ``state_sigmas``."""

    latents: Tensor
    cond: Cond
    states: Tensor | None = None
    state_sigmas: tuple[float, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        states = None if self.states is None else self.states.to(device)
        return Batch(self.latents.to(device), self.cond.to(device), states, self.state_sigmas)


class LatentDataset:
    """A cached dataset, opened for reading.

    Raises ValueError for a folder without shards, a truncated shard, mismatched counts or latents that are not 4-D.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.glob("shard-*.safetensors"))
        if not self.paths:
            raise ValueError(f"no shards in {self.folder}; make them with the `cache` command")
        self.files = [_open_shard(path) for path in self.paths]
        self._shuffled: tuple[tuple[int, int, int], list[list[Item]]] | None = None  # (epoch, size, seed) and batches
        self.state_sigmas = tuple(json.loads((self.files[0].metadata() or {}).get("state_sigmas", "[]")))
        # By C, H, W, number of text tokens, and which tensors there are: what can be stacked into one batch.
        self.buckets: dict[tuple, list[Item]] = defaultdict(list)
        for index, file in enumerate(self.files):
            count, *shape = file.get_slice("latents").get_shape()
            tokens = file.get_slice("context").get_shape()[1]
            self.buckets[(*shape, tokens, *sorted(file.keys()))] += [(index, row) for row in range(count)]

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Latent shapes [C, H, W] of the buckets."""
        return list(dict.fromkeys(bucket[:3] for bucket in self.buckets))

    def manifest(self) -> dict:
        """How the latents were made (``dataset.json``)."""
        path = self.folder / "dataset.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: it says how the latents were made; cache the dataset again")
        return json.loads(path.read_text())

    def digest(self) -> str:
        """A hash of how the latents were made and of samples of every file, to recognise the dataset."""
        manifest = json.dumps(self.manifest(), sort_keys=True)
        files = [file_digest(path) for path in (*self.paths, self.folder / "uncond.safetensors")]
        return hashlib.sha256("".join([manifest, *files]).encode()).hexdigest()[:16]

    def uncond(self) -> Cond:
        """The empty conditioning (one row) that the teacher was guided away from."""
        return Cond.from_tensors(load_tensors(self.folder / "uncond.safetensors")[0])

    def batch(self, number: int, size: int, seed: int, rows: slice = slice(None)) -> Batch:
        """Batch ``number`` of an endless shuffled stream; a batch has one latent size and one number of text tokens.

        Only (seed, number, size) decide what is in it. ``rows`` picks the part of one process.
        Raises ValueError for latents that are not finite.
        """
        epoch, position = divmod(number, self._batches_per_epoch(size))
        return self.read(self._epoch(epoch, size, seed)[position][rows])

    def read(self, items: Sequence[Item]) -> Batch:
        """The items, in that order."""
        names = self.files[items[0][0]].keys()
        tensors = {}
        for name in names:
            slices = [self.files[shard].get_slice(name)[row : row + 1] for shard, row in items]
            tensors[name] = torch.cat(slices).float()
        latents, states = tensors.pop("latents"), tensors.pop("states", None)
        if not torch.isfinite(latents).all():
            bad = next(item for item, row in zip(items, latents, strict=True) if not torch.isfinite(row).all())
            raise ValueError(
                f"{self.paths[bad[0]]} has a non-finite latent in row {bad[1]}; delete the shard and cache again"
            )
        return Batch(latents, Cond.from_tensors(tensors), states, self.state_sigmas)

    def _batches_per_epoch(self, size: int) -> int:
        return sum(max(1, len(items) // size) for items in self.buckets.values())

    def _epoch(self, epoch: int, size: int, seed: int) -> list[list[Item]]:
        """`_shuffle`, remembered: the batches of an epoch are asked for one after the other."""
        if self._shuffled is None or self._shuffled[0] != (epoch, size, seed):
            self._shuffled = (epoch, size, seed), self._shuffle(epoch, size, seed)
        return self._shuffled[1]

    def _shuffle(self, epoch: int, size: int, seed: int) -> list[list[Item]]:
        """Full batches of each bucket in random order; a bucket smaller than a batch is repeated to fill one."""
        generator = item_generator(seed, epoch)  # drawn from bucket by bucket, then for the order of the batches
        batches = []
        for items in self.buckets.values():
            order = torch.randperm(len(items), generator=generator).tolist()
            order *= max(1, -(-size // len(order)))  # 3 items for batches of 8: 0 2 1, 0 2 1, 0 2 1
            # What is left over at the end, less than a batch, waits for another epoch's order.
            starts = range(0, max(1, len(items) // size) * size, size)
            batches += [[items[i] for i in order[start : start + size]] for start in starts]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


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
    counts = {name: shape[0] for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: latents and conditioning differ in count: {counts}; cache the dataset again")
    return file
