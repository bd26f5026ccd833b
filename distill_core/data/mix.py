"""Several datasets as one: each batch is of one of them, and they take turns by their weights.

So own pictures can be mixed with the teacher's samples, which keep the student what it was elsewhere. What only some
datasets have, such as the states that the pairs term needs, serves in their batches alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.schedules import same_level
from ..models.denoiser import Cond
from ..settings import Checked, setting
from .dataset import LatentDataset
from .epochs import BatchSize, Epochs, Item


@dataclass(frozen=True)
class DataConfig(Checked):
    """What a student learns from, where that is more than one dataset."""

    mix: dict[str, float] = setting(
        {},
        "Folders of datasets with their weights, for example { own = 1.0, teacher = 0.5 }: two of three batches are of "
        "own. It takes the place of --data.",
        above=0,
        high=1e6,
    )


@dataclass(frozen=True)
class Mix:
    """Folders of datasets with their shares of the batches, which add up to 1."""

    parts: tuple[tuple[Path, float], ...]


def new_mix(weights: Mapping[Path, float]) -> Mix:
    """The mix of folders with any positive weights; 0.1 and 0.2 are the same mix as 1 and 2, bit for bit."""
    total = sum(weights.values())
    return Mix(tuple((folder, float(f"{weight / total:.9g}")) for folder, weight in weights.items()))


def mixed(a: Path | Mix, b: Path | Mix, share: float) -> Mix:
    """Two datasets or mixes as one: ``share`` of the batches are of ``b``."""
    weights: dict[Path, float] = defaultdict(float)
    for source, part in ((a, 1 - share), (b, share)):
        for folder, weight in source.parts if isinstance(source, Mix) else ((source, 1.0),):
            weights[folder] += part * weight
    return new_mix(weights)


def open_data(source: Path | Mix) -> LatentDataset:
    """A dataset's folder, or several, opened for reading."""
    if isinstance(source, Mix) and len(source.parts) > 1:
        return MixedDataset(source)
    return LatentDataset(source.parts[0][0] if isinstance(source, Mix) else source)


class MixedDataset(LatentDataset):
    """Datasets read as one. Batch n is of the dataset whose turn it is, the next one of that dataset's own stream.

    The empty conditioning and the guidance are those of the model's own samples, where there are some.
    Raises ValueError for datasets that were guided, or keep states, at different values, or whose items are told
    different things.
    """

    def __init__(self, mix: Mix) -> None:
        self.mix, self.members = mix, [LatentDataset(folder) for folder, _ in mix.parts]
        self.folder = Path(" + ".join(folder.name for folder, _ in mix.parts))
        self.paths = [path for member in self.members for path in member.paths]
        self.files = [file for member in self.members for file in member.files]
        self.state_sigmas = self._same_states()
        self.guidance = self._same_guidance()
        self._check_conditions()
        self.buckets, first = defaultdict(list), 0
        for number, member in enumerate(self.members):
            for key, items in member.buckets.items():  # the number goes last: a batch is of one member
                self.buckets[(*key, number)] = [(shard + first, row) for shard, row in items]
            first += len(member.files)
        self._begin()

    def _begin(self) -> None:
        """Streams of the members, and whose turn it is."""
        own: dict[int, dict[tuple, list[Item]]] = defaultdict(dict)
        for key, items in self.buckets.items():
            own[key[-1]][key] = items
        self.streams = {number: Epochs(buckets) for number, buckets in own.items()}
        self.turns: list[tuple[int, int]] = []  # of batch n: (member, the number of its own batch)
        self.given = dict.fromkeys(self.streams, 0)

    def part(self, keep: Callable[[Item], bool]) -> LatentDataset:
        part = super().part(keep)
        assert isinstance(part, MixedDataset)
        part._begin()
        return part

    def items_of(self, number: int, size: BatchSize, seed: int) -> list[Item]:
        member, own = self._turn(number)
        return self.streams[member].batch(own, size, seed)

    def _turn(self, number: int) -> tuple[int, int]:
        """By Sainte-Lague's quotients, so that after any number of batches the shares are as near as they can be."""
        while len(self.turns) <= number:
            chosen = max(self.streams, key=lambda m: self.mix.parts[m][1] / (2 * self.given[m] + 1))
            self.turns.append((chosen, self.given[chosen]))
            self.given[chosen] += 1
        return self.turns[number]

    @property
    def leading(self) -> LatentDataset:
        """The first of the members that the model made, or the first of all."""
        return next(iter(self._made()), self.members[0])

    def _made(self) -> list[LatentDataset]:
        """Members that the model made: samples of the turbo that is tuned, where there are some, else a teacher's."""
        manifests = [(member, member.manifest()) for member in self.members]
        kept = [member for member, manifest in manifests if "kept" in manifest]
        return kept or [member for member, manifest in manifests if "config" in manifest]

    def _same_states(self) -> tuple[float, ...]:
        having = [member for member in self.members if member.state_sigmas]
        for other in having[1:]:
            a, b = having[0].state_sigmas, other.state_sigmas
            if len(a) != len(b) or not all(map(same_level, a, b)):
                raise ValueError(
                    f"{having[0].folder} keeps pairs at {[round(s, 4) for s in a]} and {other.folder} at "
                    f"{[round(s, 4) for s in b]}: mix datasets that keep them at the same levels, or none"
                )
        return having[0].state_sigmas if having else ()

    def _same_guidance(self) -> float:
        guided = [(member.folder, member.manifest()["guidance"]) for member in self._made()]
        for folder, guidance in guided[1:]:
            if guidance != guided[0][1]:
                raise ValueError(
                    f"{guided[0][0]} was sampled at guidance {guided[0][1]:g} and {folder} at {guidance:g}: mix "
                    "datasets of one guidance (cfg)"
                )
        return guided[0][1] if guided else 1.0

    def _check_conditions(self) -> None:
        first = self.members[0]
        for other in self.members[1:]:
            if other.conditions != first.conditions:
                a, b = (" and ".join(member.conditions) or "no per-item tensors" for member in (first, other))
                raise ValueError(
                    f"{first.folder} has {a} and {other.folder} has {b}: what a network is told of an item it is told "
                    "of every one; mix datasets that have the same"
                )

    def manifest(self) -> dict:
        mix = [[member.digest(), share] for member, (_, share) in zip(self.members, self.mix.parts, strict=True)]
        return {**self.leading.manifest(), "guidance": self.guidance, "mix": mix}

    def digest(self) -> str:
        """A hash of the members' digests and shares."""
        return hashlib.sha256(json.dumps(self.manifest()["mix"]).encode()).hexdigest()[:16]

    def uncond(self) -> Cond:
        return self.leading.uncond()
