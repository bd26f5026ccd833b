"""Filling a dataset's folder shard by shard, so that a process that stops anywhere loses one batch at most.

A batch that is made lies in the folder at once, as ``shard-00003.part-00016.safetensors``: the rows from 16 on of shard
3. When all rows of a shard are there, they are joined and the parts go.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import first_line, sentence
from ..files import DTYPES, load_tensors, save_tensors
from ..models.items import of_file, wrong_shape, wrong_values

FILE = re.compile(r"shard-(\d{5,})(?:\.part-(\d{5,}))?\.safetensors")
# Items done, items in all, and the latents of the batch that is finished (None where they were already there).
Progress = tuple[int, int, Tensor | None]
Make = Callable[[Sequence[int], int], dict[str, Tensor]]  # (items, shard) -> the items' tensors, batch first


class Shard(NamedTuple):
    """What a shard is to hold: items of one latent size (H, W)."""

    items: Sequence[int]
    size: tuple[int, int]


class Damaged(ValueError):
    """A file of a dataset that cannot be used; its items can be made again."""


def shard_path(folder: Path, number: int, row: int | None = None) -> Path:
    """The file of a shard, or of its part that begins with a row."""
    part = "" if row is None else f".part-{row:05d}"
    return folder / f"shard-{number:05d}{part}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The files that hold the dataset so far: each shard, or the parts of one that is not complete."""
    found = {path: match for path in folder.glob("shard-*") if (match := FILE.fullmatch(path.name))}
    whole = {match[1] for match in found.values() if match[2] is None}
    return sorted(path for path, match in found.items() if match[2] is None or match[1] not in whole)


def held_items(folder: Path, shard_size: int) -> int:
    """How many items the folder holds, counted to the last one, in shards of ``shard_size``."""
    ends = [0]
    for path in shard_files(folder):
        match = FILE.fullmatch(path.name)
        assert match is not None  # they are chosen by it
        try:
            with safe_open(path, "pt") as file:
                rows = file.get_slice("latents").get_shape()[0]
        except (SafetensorError, OSError, IndexError):
            continue
        ends.append(int(match[1]) * shard_size + min(shard_size, int(match[2] or 0) + rows))
    return max(ends)


def fill(
    folder: Path,
    plan: Sequence[Shard],
    make: Make,
    batch_size: int,
    dtype: str,
    metadata: dict[str, str],
    needs: Collection[str] = ("latents", "context"),
    maker: str = "the teacher",
) -> Iterator[Progress]:
    """Make what is missing of the planned shards.

    A batch begins at a multiple of ``batch_size`` in its shard, unless one of another size was there: so a dataset
    that was stopped, or grew, is the one that is made at once. A damaged file is named in the log, and made again.
    needs: tensors that each shard must have. Raises ValueError when a latent is not finite, a per-item tensor is not as
    declared, or a file cannot be read.
    """
    done, total = 0, sum(len(shard.items) for shard in plan)
    for number, shard in enumerate(plan):
        files = ShardFiles(folder, number, shard, needs)
        row = files.rows_there(batch_size)
        if row:
            yield done + row, total, None
        while row < len(shard.items):
            batch = shard.items[row : row + batch_size]
            tensors = make(batch, number)
            for name in ("latents", *filter(of_file, tensors)):
                if not torch.isfinite(tensors[name]).all():
                    raise ValueError(f"{maker} gave non-finite {name} for items {batch[0]}-{batch[-1]}")
            if wrong := wrong_shape({name: value.shape for name, value in tensors.items()}) or wrong_values(tensors):
                raise ValueError(f"items {batch[0]}-{batch[-1]} cannot be stored: {wrong}")
            files.add(row, {name: value.to(DTYPES[dtype]) for name, value in tensors.items()}, metadata)
            row += len(batch)
            yield done + row, total, tensors["latents"]
        files.join(metadata)
        done += len(shard.items)


class ShardFiles:
    """The files of one shard, and which of their rows can be kept."""

    def __init__(self, folder: Path, number: int, shard: Shard, needs: Collection[str]) -> None:
        self.folder, self.number, self.shard, self.needs = folder, number, shard, needs
        self.whole = shard_path(folder, number)
        self.of_whole = 0  # rows of the shard's own file that are kept

    def rows_there(self, batch_size: int) -> int:
        """How many rows need not be made: those from the start on without a gap.

        A last batch that is smaller than others is made again: then the count was smaller, too.
        """
        wanted, self.of_whole = len(self.shard.items), self._rows(self.whole)
        if self.of_whole == wanted:
            return wanted
        self.of_whole -= self.of_whole % batch_size
        row, last = self.of_whole, 0
        while row < wanted and (rows := self._rows(self._part(row))):
            row, last = row + rows, rows
        return row - last if row < wanted and row % batch_size and last < batch_size else min(row, wanted)

    def add(self, row: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Store the rows from ``row`` on."""
        count = len(tensors["latents"])
        if count == len(self.shard.items):
            self.of_whole = count
        save_tensors(self.whole if self.of_whole == len(self.shard.items) else self._part(row), tensors, metadata)

    def join(self, metadata: dict[str, str]) -> None:
        """All rows into the shard's own file."""
        wanted = len(self.shard.items)
        if self.of_whole < wanted:
            pieces, row = [], self.of_whole
            if row:
                pieces.append({name: value[:row] for name, value in load_tensors(self.whole)[0].items()})
            while row < wanted:
                pieces.append(load_tensors(self._part(row))[0])
                row += len(pieces[-1]["latents"])
            save_tensors(self.whole, {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}, metadata)
        for part in self.folder.glob(f"shard-{self.number:05d}.part-*.safetensors"):
            part.unlink(missing_ok=True)

    def _part(self, row: int) -> Path:
        return shard_path(self.folder, self.number, row)

    def _rows(self, path: Path) -> int:
        try:
            return len(read_rows(path, self.needs, self.shard)["latents"]) if os.path.lexists(path) else 0
        except Damaged as error:
            logging.warning("%s; its items are made again", error)
            return 0


def read_rows(path: Path, needs: Collection[str], shard: Shard) -> dict[str, Tensor]:
    """A shard's tensors. Raises Damaged for what is no shard of these items, ValueError where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except OSError as error:
        raise ValueError(sentence(error, path)) from error
    except SafetensorError as error:
        raise Damaged(f"{path} is truncated or not a safetensors file ({first_line(error)})") from error
    lacking = [name for name in needs if name not in tensors]
    counts = {name: value.shape[0] if value.ndim else 0 for name, value in tensors.items()}
    if lacking:
        raise Damaged(f"{path} is damaged: {lacking[0]} is missing")
    if len(set(counts.values())) > 1 or not 0 < counts["latents"] <= len(shard.items):
        raise Damaged(f"{path} is damaged: it has {counts} rows where {len(shard.items)} are wanted")
    if tensors["latents"].ndim != 4 or tuple(tensors["latents"].shape[2:]) != tuple(shard.size):
        raise Damaged(
            f"{path} is damaged: its latents are {list(tensors['latents'].shape)} where [N, C, {shard.size[0]}, "
            f"{shard.size[1]}] is wanted"
        )
    for name, value in tensors.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise Damaged(f"{path} is damaged: {name} has values that are not finite numbers")
    if wrong := wrong_shape({name: value.shape for name, value in tensors.items()}) or wrong_values(tensors):
        raise Damaged(f"{path} is damaged: {wrong}")
    return tensors
