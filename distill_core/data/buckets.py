"""The report of a dataset of pictures: what sizes it has, how often each picture comes, what was cut off."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from ..files import read_json, save_json
from .epochs import BatchSize, items_in
from .pictures import Picture, PictureConfig, by_bucket, cropped_share, scale_of, spell_left_out

NAME = "pictures.json"


def report(pictures: list[Picture], left_out: dict[str, str], config: PictureConfig) -> dict[str, Any]:
    """Everything there is to say, as JSON; `spell` makes the text."""
    buckets = []
    for bucket, numbers in by_bucket(pictures, config).items():
        sizes = [pictures[number].size for number in numbers]
        cropped = [cropped_share(size, bucket) for size in sizes]
        buckets.append(
            {
                "width": bucket[0],
                "height": bucket[1],
                "pictures": len(numbers),
                "cropped_mean": round(sum(cropped) / len(cropped), 4),
                "cropped_most": round(max(cropped), 4),
                "upscaled": sum(scale_of(size, bucket) > 1 for size in sizes),
            }
        )
    files = {
        p.name: {
            **{"digest": p.digest, "size": list(p.size), "caption": p.caption},
            **({"mask": p.mask} if p.mask else {}),
            **({"source": p.source_digest} if p.source else {}),
            **({"rejected": p.rejected_digest} if p.rejected else {}),
        }
        for p in pictures
    }
    return {"buckets": buckets, "left_out": left_out, "files": files}


def repeats(count: int, batch_size: int) -> float:
    """How often each of ``count`` items of a bucket comes in an epoch: a bucket smaller than a batch fills one."""
    return max(1.0, batch_size / count)


def spell(said: dict[str, Any], size: BatchSize | None = None, each: int = 1, pixels: int = 8) -> str:
    """The report as text; with a batch size, how often the pictures of a small bucket are repeated.

    each: items made of a picture.  pixels: of a picture that are one position of its latent, along a side.
    """
    lines = [f"{_count(said['files'], 'picture')} in {_count(said['buckets'], 'size')}"]
    for row in said["buckets"]:
        parts = [f"{row['width']}x{row['height']}: {row['pictures']}"]
        batch_size = size and items_in(size, (0, row["height"] // pixels, row["width"] // pixels))
        if batch_size and (items := each * row["pictures"]) < batch_size:
            parts.append(
                f"each comes {each * repeats(items, batch_size):.3g} times an epoch at batch_size {batch_size}"
            )
        if row["cropped_most"] >= 0.005:
            parts.append(f"cropped {row['cropped_mean']:.0%}, at most {row['cropped_most']:.0%}")
        if row["upscaled"]:
            parts.append(f"{row['upscaled']} scaled up")
        lines.append(", ".join(parts))
    for beside, what in (("source", "its source"), ("rejected", "a rejected one")):
        if pairs := sum(beside in file for file in said["files"].values()):
            lines.append(f"each with {what}: {_count(range(pairs), 'pair')}")
    bare = [name for name, file in said["files"].items() if not file["caption"]]
    if bare:
        lines.append(f"without a caption: {len(bare)} ({', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''})")
    if said["left_out"]:
        lines.append(f"left out: {spell_left_out(said['left_out'])}")
    return "\n".join(lines)


def _count(of: Sized, what: str) -> str:
    return f"{len(of)} {what}{'s' * (len(of) != 1)}"


def save(folder: Path, said: dict[str, Any]) -> None:
    save_json(folder / NAME, said)


def differences(folder: Path, said: dict[str, Any]) -> str:
    """Which pictures are other ones than those that the folder's report names: "1 added (c.png); 1 changed (a.png)"."""
    try:
        before = read_json(folder / NAME)["files"]
        old = {name: _told(file) for name, file in before.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    new = {name: _told(file) for name, file in said["files"].items()}
    kept = [name for name in new if name in old and new[name][0] == old[name][0]]
    kinds = {
        "added": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name][0] != old[name][0]],
        "with another caption": [name for name in kept if new[name][1] != old[name][1]],
        "with another mask": [name for name in kept if new[name][2] != old[name][2]],
        "with another source": [name for name in kept if new[name][3] != old[name][3]],
        "with another rejected picture": [name for name in kept if new[name][4] != old[name][4]],
    }
    told = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return "; ".join(told)


def _told(file: dict[str, Any]) -> tuple[str | None, ...]:
    """What decides an item of a file, as a report tells it."""
    return file["digest"], file["caption"], *(file.get(beside) for beside in ("mask", "source", "rejected"))
