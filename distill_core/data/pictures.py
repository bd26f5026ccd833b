"""Own pictures from a folder: which files count, how each is read, and what it says of itself.

Hidden files and folders are left out, folders of datasets and runs, and NAME.mask.png beside a picture NAME. A linked
folder is entered once, and a file counts once, however many links lead to it. What cannot be read is left out and
named, with the reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..digests import file_digest
from ..errors import first_line, printable
from ..files import DTYPES, read_text
from ..settings import Checked, setting

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
NOT_READ = (".heic", ".heif", ".jxl", ".psd", ".svg", ".exr", ".dng", ".cr2", ".nef", ".arw")
OURS = ("dataset.json", "log.jsonl")  # of a folder that holds a dataset or a run, whose pictures are its own
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
SMALLEST = 16  # pixels of a side
MOST = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # pixels of a picture; Pillow refuses more and warns of half as many


@dataclass(frozen=True)
class PictureConfig(Checked):
    """How own pictures become latents."""

    size: int = setting(
        1024,
        "Side of a square picture in pixels. Other shapes are scaled to about as many pixels; use the size that the "
        "model was made for.",
        low=SMALLEST,
        high=8192,
    )
    step: int = setting(64, "Sides of the sizes are multiples of so many pixels, itself one of 16.", low=16, high=512)
    ratio: float = setting(
        2.0, "How much longer than the other a side may be; longer pictures are cropped to this.", low=1, high=8
    )
    caption: str = setting("", "Caption of pictures that have no text file beside them, or an empty one.")
    background: str = setting(
        "white", "What shows through transparent pictures: white, gray or black.", choices=BACKGROUNDS
    )
    sources: str = setting(
        "",
        "The folder of the pictures before they are edited, for models that edit: each has the name and the size of "
        "its result in the folder of --images. Empty: none.",
        decides=False,
        added=True,
    )
    rejected: str = setting(
        "",
        'The folder of the pictures that were found worse than those of --images, for method = "dpo": each has the '
        "name (its suffix may differ) and the size of the one it was compared with. Empty: none.",
        decides=False,
        added=True,
    )
    batch_size: int = setting(1, "Pictures that are encoded at once.", low=1, high=4096)
    dtype: str = setting("float32", 'Number format of the files: "float32", "float16" or "bfloat16".', choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step % 16:
            raise ValueError(f"step must be a multiple of 16 (what a network takes as one patch), not {self.step}")
        if self.size < self.step:
            raise ValueError(f"size {self.size} is smaller than step {self.step}: lower step")


class Picture(NamedTuple):
    """A picture that can be read.

    name: relative to the folder, with /.  size: (width, height) as it is meant to be seen.  digest: of the file.
    mask, mask_path: digest and file of its own mask, empty and None where none is used.  source: the picture before it
    was edited, and its digest, where it is an edit.  rejected: the picture that was found the worse one, and its
    digest, in a pair.
    """

    path: Path
    name: str
    caption: str
    size: tuple[int, int]
    digest: str
    mask: str = ""
    mask_path: Path | None = None
    source: Path | None = None
    source_digest: str = ""
    rejected: Path | None = None
    rejected_digest: str = ""


def with_partners(
    pictures: Sequence[Picture], partner: Callable[[Picture], Picture | str], none: str
) -> tuple[list[Picture], dict[str, str]]:
    """The pictures as ``partner`` completes them, and the names of those for which it gives a reason instead.

    Raises ValueError, with ``none`` before the first reason, when there is no picture left.
    """
    found: list[Picture] = []
    left_out: dict[str, str] = {}
    for picture in pictures:
        completed = partner(picture)
        if isinstance(completed, str):
            left_out[picture.name] = completed
        else:
            found.append(completed)
    if not found:
        name, why = next(iter(left_out.items()))
        raise ValueError(f"{none}: {name} {why}")
    return found, left_out


def find(folder: str | Path) -> dict[str, Path]:
    """Name -> path of the files that look like pictures, in order. Raises ValueError for what is no folder."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give the folder that the pictures are in")
    entered: set[str] = set()
    found: dict[str, Path] = {}  # real path -> the first way to it

    def enter(here: Path) -> None:
        real = os.path.realpath(here)
        if real in entered or (here != root and any((here / name).exists() for name in OURS)):
            return
        entered.add(real)
        for entry in sorted(here.iterdir()):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                enter(entry)
            elif entry.suffix.lower() in (*SUFFIXES, *NOT_READ):
                found.setdefault(os.path.realpath(entry), entry)

    enter(root)
    masks = {mask_file(path) for path in found.values()}
    named = {printable(path.relative_to(root).as_posix()): path for path in found.values() if path not in masks}
    return dict(sorted(named.items()))


def mask_file(path: Path) -> Path:
    """NAME.mask.png beside NAME.png: the picture's mask, and no picture itself."""
    return path.with_name(f"{path.stem}.mask.png")


def survey(folder: str | Path, config: PictureConfig) -> tuple[list[Picture], dict[str, str]]:
    """All pictures of a folder, each read once, and the names of those that are left out with the reason.

    Raises ValueError when none is left, or for a caption that is not UTF-8.
    """
    named = find(folder)

    def look(item: tuple[str, Path]) -> Picture | str:
        name, path = item
        if path.suffix.lower() in NOT_READ:
            return f"{path.suffix.lower()} is not read: save it as PNG or JPEG"
        if path.exists() and not path.is_file():
            return "not a file, but a device or a pipe"
        try:
            size = open_picture(path, config.background).size
            digest = file_digest(path)
        except Exception as error:  # whatever a decoder makes of a damaged file
            return reason(error, path)
        if min(size) < SMALLEST:
            return f"{size[0]} x {size[1]} pixels: at least {SMALLEST} are needed"
        return Picture(path, name, caption_of(path) or config.caption, size, digest)

    with large_pictures(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = dict(zip(named, pool.map(look, named.items()), strict=True))
    left_out = {name: said for name, said in looked.items() if isinstance(said, str)}
    pictures = [picture for picture in looked.values() if isinstance(picture, Picture)]
    if not pictures:
        why = f": {spell_left_out(left_out)}" if left_out else f" ({', '.join(SUFFIXES)})"
        raise ValueError(f"{folder} holds no picture that can be read{why}")
    return pictures, left_out


@contextmanager
def large_pictures() -> Iterator[None]:
    """No warning of Pillow's for a picture with fewer pixels than `MOST`. Not thread-safe: begin it in one thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def reason(error: Exception, path: Path) -> str:
    """Why a picture cannot be read, without its path."""
    if isinstance(error, FileNotFoundError):
        return "a link that leads nowhere"
    if isinstance(error, PermissionError):
        return "may not be read by this user"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST // 10**6} million pixels: save it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty" if path.stat().st_size == 0 else "not a picture, or damaged at its start"
    return first_line(error)


def spell_left_out(left_out: dict[str, str], most: int = 20) -> str:
    told = [f"{name} ({why})" for name, why in list(left_out.items())[:most]]
    return "; ".join(told) + (f"; and {len(left_out) - most} more" if len(left_out) > most else "")


def caption_of(path: Path) -> str:
    """The text file beside a picture, in one line; empty where there is none."""
    beside = caption_file(path)
    return " ".join(read_text(beside).split()) if beside.is_file() else ""


def caption_file(path: Path) -> Path:
    """NAME.txt beside NAME.png; NAME.TXT, as cameras and Windows write it, where only that is there."""
    lower, upper = path.with_suffix(".txt"), path.with_suffix(".TXT")
    return upper if upper.is_file() and not lower.exists() else lower


def load_picture(path: Path) -> Image.Image:
    """A picture as it is in its file, turned as its EXIF says; of an animation the first one."""
    with Image.open(path) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened)


def open_picture(path: Path, background: str | None) -> Image.Image:
    """A picture in RGB as it is meant to be seen: turned as its EXIF says, transparent parts over the background.

    background: None shows the colours that lie under what is transparent.
    16 bits are scaled to 8; of an animation it is the first picture. Raises what the decoder raises for a damaged file,
    ValueError for pixels that are no 8 or 16 bit numbers.
    """
    image = load_picture(path)
    if image.mode == "F":
        raise ValueError("has floating-point pixels: save it as PNG or JPEG")
    if image.mode.startswith("I"):  # 16 bit grey; Pillow would clip it to white
        values = numpy.asarray(image)
        if values.max() > 65535 or values.min() < 0:
            raise ValueError("has 32-bit pixels: save it as PNG or JPEG")
        image = Image.fromarray((values / 257).round().astype(numpy.uint8))
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        if background is not None:
            canvas = Image.new("RGBA", image.size, (*BACKGROUNDS[background], 255))
            canvas.alpha_composite(image)
            image = canvas
    return image.convert("RGB")


def bucket_sizes(config: PictureConfig) -> list[tuple[int, int]]:
    """Sizes (width, height) in pixels: for each width the tallest that has at most ``size`` squared pixels."""
    step, area, sizes = config.step, config.size**2, []
    side = config.size - config.size % step
    for width in range(step, int(config.size * config.ratio**0.5) + step, step):
        for w, h in ((width, area // width), (area // width, width)):
            w, h = w - w % step, h - h % step
            if w and h and max(w, h) <= config.ratio * min(w, h):
                sizes.append((w, h))
    return sorted({*sizes, (side, side)})


def bucket_of(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is the nearest, and of those the largest."""
    ratio = lambda s: numpy.log(s[0] / s[1])  # noqa: E731
    return min(sizes, key=lambda s: (round(abs(ratio(s) - ratio(size)), 6), -s[0] * s[1]))


def scale_of(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """How much a picture is scaled to cover its bucket; above 1 it is made larger."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cropped_share(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The share of a picture that does not fit into its bucket."""
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale_of(size, bucket) ** 2)


def read_into(picture: Picture, bucket: tuple[int, int], background: str | None) -> Tensor:
    """[3, H, W] in [-1, 1]: the picture scaled to cover the bucket (width, height), its middle."""
    return read_file_into(picture.path, bucket, background)


def read_file_into(path: Path, bucket: tuple[int, int], background: str | None) -> Tensor:
    """The same of a file."""
    with large_pictures():
        image = ImageOps.fit(open_picture(path, background), bucket, Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def by_bucket(pictures: list[Picture], config: PictureConfig) -> dict[tuple[int, int], list[int]]:
    """Bucket (width, height) -> numbers of its pictures, the wide ones last."""
    sizes = bucket_sizes(config)
    chosen: dict[tuple[int, int], list[int]] = {}
    for number, picture in enumerate(pictures):
        chosen.setdefault(bucket_of(picture.size, sizes), []).append(number)
    return dict(sorted(chosen.items()))
