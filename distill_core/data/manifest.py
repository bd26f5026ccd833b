"""``dataset.json``: how a dataset was made, and whether what is asked for now is the same dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..changes import Changes, changes_between, spell_change
from ..files import load_tensors, read_json, save_json, save_tensors
from ..models.denoiser import Cond

NAME, UNCOND = "dataset.json", "uncond.safetensors"
CURE = "choose another folder, or delete it to make it anew"
# What decides how an item is made and not what it is, or says the same as another entry.
HOW = ("config.count", "config.batch_size", "config.shard_size")
SAME = {"guidance": "config.guidance", "state_sigmas": "config.state_sigmas"}
# Identities whose values say nothing to a reader.
DIGESTS = ("base", "prompts", "items", "negative", "content", "autoencoder", "sigmas", "scorer")


class OtherDataset(ValueError):
    """A folder holds another dataset than the one that is asked for.

    changes: in what they differ.  stored: the manifest of the one that is there.  told: more exact words for some of
    the changes.
    """

    def __init__(self, folder: Path, changes: Changes, stored: dict, told: Mapping[str, str] | None = None) -> None:
        self.folder, self.changes, self.stored, self.told = folder, changes, stored, told or {}
        super().__init__(self.said())

    def said(self, words: Mapping[str, str] | None = None, cure: str = CURE) -> str:
        """The sentence with names from ``words`` (of keys or widgets) where they are there."""
        words = words or {}
        told = [
            self.told.get(name)
            or spell_change(words.get(name, name.removeprefix("config.")), *values, by_value=name not in DIGESTS)
            for name, values in self.changes.items()
        ]
        return f"{self.folder} holds a dataset made with other settings ({'; '.join(told)}); {cure}"


def begin(
    folder: Path,
    manifest: dict,
    uncond: Cond,
    ignored: Collection[str] = (),
    grown: Callable[[dict], None] = lambda there: None,
) -> dict:
    """Say in the folder what dataset it holds, and store the empty conditioning; returns the manifest that is there.

    A dataset that is there keeps its manifest. ignored: entries that may differ.  grown: changes the manifest in place
    to what it is to become. Raises OtherDataset when the folder holds another one, ValueError for shards that nothing
    is said about.
    """
    path, now = folder / NAME, plain(manifest)
    if not path.exists():
        if any(folder.glob("shard-*")):
            raise ValueError(
                f"{folder} holds shards, and no {NAME} that says how they were made: delete the folder, or choose "
                "another one"
            )
        there = now
    else:
        there = read_json(path, "delete the folder to make the dataset again")
        if ("config" in now) != ("config" in there):
            kinds = ("latents of a teacher", "pictures")
            raise OtherDataset(folder, {"kind": kinds if "config" in now else kinds[::-1]}, there)
        changes = changes_between(now, there)
        for name in (*HOW, *ignored, *(name for name, other in SAME.items() if other in changes)):
            changes.pop(name, None)
        if "sigmas" in changes and changes.keys() & {"config.steps", "config.state_sigmas"}:
            del changes["sigmas"]  # they follow from these
        if other_uncond(folder, uncond):
            changes["negative"] = ("", "")
        if changes:
            raise OtherDataset(folder, changes, there)
    before = json.dumps(there)
    grown(there)
    if not path.exists() or json.dumps(there) != before:
        save_json(path, there)
    save_tensors(folder / UNCOND, uncond.tensors())
    return there


def other_uncond(folder: Path, uncond: Cond) -> bool:
    """Whether the folder keeps another empty conditioning; a damaged one is written anew."""
    try:
        stored, _ = load_tensors(folder / UNCOND)
    except ValueError:
        return False
    now = uncond.tensors()
    if stored.keys() != now.keys() or any(not torch.isfinite(value).all() for value in stored.values()):
        return False  # damaged: a conditioning of another kind has other prompts as well
    return any(not torch.equal(stored[name].cpu(), value.cpu().to(stored[name].dtype)) for name, value in now.items())


def plain(value: Any) -> Any:
    """Through JSON, so that tuples compare equal to what a file gives back."""
    return json.loads(json.dumps(value))
