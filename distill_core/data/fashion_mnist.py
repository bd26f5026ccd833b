"""Fashion-MNIST from the files that Debian's dataset-fashion-mnist installs."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DEBIAN_DATA = "/usr/share/datasets/fashion-mnist"


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """One split of Fashion-MNIST as images [N, 1, 32, 32] in [-1, 1] (padded from 28 px) and labels [N]."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        raw = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=16)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=8).long()
    images = F.pad(raw.view(-1, 1, 28, 28), (2, 2, 2, 2))
    return images.float() / 127.5 - 1, labels


def upscale(images: Tensor) -> Tensor:
    """[B, 1, 32, 32] -> [B, 3, 64, 64], the resolution of the mini model."""
    large = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
