"""The images a calibration learns from: a folder, or Fashion-MNIST as the mini model sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.fashion_mnist import read_split, upscale
from ..diffusion.noise import item_generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Images:
    """``read(indices) -> [B, 3, H, W]`` in [-1, 1]; labels [N] or None where there are no classes."""

    count: int
    read: Callable[[Sequence[int]], Tensor]
    labels: Tensor | None


def open_images(path: Path, size: int, seed: int) -> tuple[Images, Images]:
    """(training, held-out) images of a folder, square, ``size`` pixels; a tenth is held out.

    A folder with Fashion-MNIST's four .gz files gives its two splits at the mini model's 64 pixels. In another one all
    pictures count, and where all lie in subfolders these are the classes. Raises ValueError for too few pictures.
    """
    if (path / "train-images-idx3-ubyte.gz").is_file():
        return _fashion(path, "train"), _fashion(path, "t10k")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if len(files) < 20:
        raise ValueError(f"{path} holds {len(files)} pictures ({', '.join(SUFFIXES)}); calibration needs at least 20")
    parents = sorted({f.parent for f in files})
    labels = (
        torch.tensor([parents.index(f.parent) for f in files]) if len(parents) > 1 and path not in parents else None
    )
    order = torch.randperm(len(files), generator=item_generator(seed, 0)).tolist()
    held_out = max(1, len(files) // 10)

    def part_of(indices: list[int]) -> Images:
        read = lambda pick: torch.stack([_open(files[indices[i]], size) for i in pick])  # noqa: E731
        return Images(len(indices), read, None if labels is None else labels[indices])

    return part_of(order[held_out:]), part_of(order[:held_out])


def _fashion(path: Path, split: str) -> Images:
    images, labels = read_split(path, split)
    return Images(len(images), lambda pick: upscale(images[list(pick)]).contiguous(), labels)


def _open(file: Path, size: int) -> Tensor:
    """The middle square of a picture."""
    from numpy import asarray
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(asarray(square).copy()).permute(2, 0, 1).float() / 127.5 - 1
