"""Masks for inpainting: which part of a picture is to be filled, drawn at random or the person's own.

Own ones are files beside the pictures or in a folder of their own, or the transparent parts of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..digests import file_digest
from ..models.items import PIXELS
from ..settings import SEED_MAX, Checked, setting
from .pictures import (
    SUFFIXES,
    Picture,
    PictureConfig,
    bucket_of,
    bucket_sizes,
    load_picture,
    mask_file,
    open_picture,
    reason,
    with_partners,
)
from .random_masks import KINDS, SHARES, random_masks

NONE, RANDOM, FILES, ALPHA = "none", "random", "files", "alpha"
WHITE = 127  # of 255, above which a pixel of a mask is to be filled


@dataclass(frozen=True)
class MaskConfig(Checked):
    """What of own pictures is to be filled."""

    source: str = setting(
        NONE,
        'Where the masks of an inpainting model\'s pictures come from: "random"; "files", NAME.mask.png beside each '
        'picture, white where it is to be filled; "alpha", the transparent parts of the pictures. "none": pictures '
        "without masks, for other models.",
        choices=(NONE, RANDOM, FILES, ALPHA),
    )
    folder: str = setting(
        "", "With files: a folder with masks of the pictures' names, instead of beside them. Any suffix of a picture."
    )
    shares: dict[str, float] = setting(
        SHARES,
        "How often a random mask is of each kind; they need not sum to 1. full hides the whole picture.",
        low=0,
        high=1e6,
    )
    each: int = setting(1, "Items made of each picture, every one with a random mask of its own.", low=1, high=1000)
    seed: int = setting(0, "Seed of the random masks.", low=0, high=SEED_MAX)

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.shares) - set(KINDS) or not any(self.shares.values()):
            raise ValueError(f"shares must give some of {', '.join(KINDS)} a share above 0, got {self.shares}")
        if self.source != RANDOM and self.each > 1:
            raise ValueError(f'each = {self.each} needs source = "random": a picture has one mask of its own, or none')
        if self.folder and self.source != FILES:
            raise ValueError(f'folder = "{self.folder}" is for source = "files": set it, or leave the folder out')

    def description(self) -> dict:
        """What decides the masks."""
        drawn = {"shares": self.shares, "each": self.each, "seed": self.seed} if self.source == RANDOM else {}
        return {"source": self.source, **drawn}


def with_own_masks(
    pictures: Sequence[Picture], config: MaskConfig, sizes: PictureConfig
) -> tuple[list[Picture], dict[str, str]]:
    """The pictures with the person's own mask, its digest and its file, and the names of the others with the reason.

    Files in ``config.folder`` are no pictures themselves. Raises ValueError when no picture has a mask.
    """
    buckets, folder, none = bucket_sizes(sizes), _folder(config, pictures), f"no picture has a mask ({config.source})"
    pictures = [picture for picture in pictures if folder not in picture.path.resolve().parents]
    if not pictures:
        raise ValueError(f"{none}: the folder holds masks alone")

    def masked(picture: Picture) -> Picture | str:
        path = _path(config, folder, picture)
        fault = _fault(path, picture, config, bucket_of(picture.size, buckets))
        return fault or picture._replace(mask=file_digest(path), mask_path=path)

    return with_partners(pictures, masked, none)


def _folder(config: MaskConfig, pictures: Sequence[Picture]) -> Path | None:
    if not config.folder:
        return None
    folder = Path(config.folder).resolve()
    if not folder.is_dir():
        raise ValueError(f"the folder of masks {config.folder} is not there")
    if pictures and folder == _root(pictures[0]).resolve():
        raise ValueError(f"the folder of masks {config.folder} is that of the pictures: put the masks into another one")
    return folder


def _root(picture: Picture) -> Path:
    """The folder that a picture's name is relative to."""
    return picture.path.parents[picture.name.count("/")]


def _path(config: MaskConfig, folder: Path | None, picture: Picture) -> Path:
    """Where the mask of a picture is, or would be: in a folder of masks it may have another suffix."""
    if config.source == ALPHA:
        return picture.path
    if folder is None:
        return mask_file(picture.path)
    same = folder / picture.path.relative_to(_root(picture))
    beside = [same, *(same.with_suffix(suffix) for suffix in SUFFIXES)]
    return next((path for path in beside if path.is_file()), same)


def _fault(path: Path, picture: Picture, config: MaskConfig, bucket: tuple[int, int]) -> str:
    if not path.is_file():
        return f"has no mask {path.name}"
    try:
        mask = _open_mask(path, config.source)
    except Exception as error:  # whatever a decoder makes of a damaged file
        return f"has a mask that cannot be read ({reason(error, path)})"
    if mask.size != picture.size:
        return f"is {picture.size[0]} x {picture.size[1]} and its mask {mask.size[0]} x {mask.size[1]}"
    hides = numpy.asarray(mask) > WHITE
    if not hides.any():
        return f"has {'nothing transparent' if config.source == ALPHA else 'a mask with nothing to fill (white)'}"
    if not _fitted(mask, bucket).any():
        return f"has a mask of which nothing is left at {bucket[0]} x {bucket[1]}"
    if config.source == ALPHA and _is_bare(numpy.asarray(open_picture(path, None))[hides]):
        return "has a single colour under its transparent part, so there is nothing to learn from there; use mask files"
    return ""


def _is_bare(colours: numpy.ndarray) -> bool:
    return bool((colours == colours[0]).all())


def _open_mask(path: Path, source: str) -> Image.Image:
    """White (255) where the picture is to be filled."""
    if source == ALPHA:
        return ImageOps.invert(load_picture(path).convert("RGBA").getchannel("A"))
    return open_picture(path, "black").convert("L")


def _fitted(mask: Image.Image, size: tuple[int, int]) -> numpy.ndarray:
    return numpy.asarray(ImageOps.fit(mask, size, Image.Resampling.BILINEAR)) > WHITE


def read_mask(picture: Picture, source: str, size: tuple[int, int]) -> Tensor:
    """The own mask [1, H, W] of a picture, scaled and cropped as the picture is to ``size`` (width, height)."""
    assert picture.mask_path is not None, "of with_own_masks"
    return torch.from_numpy(_fitted(_open_mask(picture.mask_path, source), size)).float().unsqueeze(0)


def masks_of(config: MaskConfig, pictures: Sequence[Picture], items: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Masks [B, 1, H, W] of items: item i is of picture i mod their number, at ``size`` (width, height)."""
    if config.source in (FILES, ALPHA):
        return torch.stack([read_mask(pictures[i % len(pictures)], config.source, size) for i in items])
    return random_masks(config.seed, items, size, config.shares)


def for_latents(masks: Tensor, scale: int) -> Tensor:
    """Masks [B, 1, H, W] of pictures for their latents, [B, 1, H / scale, W / scale]: 1 where any pixel is 1."""
    return nn.functional.max_pool2d(masks, scale)


def for_pixels(masks: Tensor) -> Tensor:
    """Masks [B, 1, H, W] of pictures as FLUX.1 Fill takes them, [B, 64, H / 8, W / 8]: each pixel is a channel."""
    return nn.functional.pixel_unshuffle(masks, PIXELS)


def hidden(images: Tensor, masks: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] with mid-grey where their masks [B, 1, H, W] are 1, as inpainting models are
    shown them."""
    return images * (1 - masks)
