"""The command ``scenes``: pictures that a program draws, with captions, or edits of them with their masks."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import trange

from ..data.scenes import draw_edits, draw_rows, draw_words, render
from ..models.scenes import SIZE, caption

BATCH = 50
MOST = 1024  # pixels of a side


def picture_size(text: str) -> tuple[int, int]:
    """Width and height: "96x64" -> (96, 64). Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = [int(side) for side in found.groups()] if found else [0]
    if not SIZE <= min(sides) <= max(sides) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write WIDTHxHEIGHT, each from {SIZE} to {MOST}")
    return sides[0], sides[1]


def run_scenes(args: argparse.Namespace) -> None:
    """Write ``00000.png`` with its caption in ``00000.txt``; with edits, in the folders before and after, and masks."""
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, not {args.seed}")
    for start in trange(0, args.count, BATCH, desc="scenes"):
        items = range(start, min(start + BATCH, args.count))
        rows = draw_rows(args.seed, items)
        if args.edits:
            for name, words in zip(("before", "after"), draw_edits(args.seed, items), strict=True):
                pictures, masks = render(words, rows, args.size)
                save(args.out / name, items, pictures, words)
                save(args.out / f"{name}_masks", items, 2 * masks - 1)
        else:
            words = draw_words(args.seed, items)
            save(args.out, items, render(words, rows, args.size)[0], words)


def save(folder: Path, items: range, pictures: Tensor, words: Tensor | None = None) -> None:
    """Pictures [B, C, h, w] in [-1, 1], and the captions of words [B, 4] beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    values = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for row, item in enumerate(items):
        Image.fromarray(np.squeeze(values[row])).save(folder / f"{item:05d}.png")
        if words is not None:
            (folder / f"{item:05d}.txt").write_text(caption(words[row].tolist()) + "\n", encoding="utf-8")
