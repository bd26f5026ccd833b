"""The retention score in words and as a picture, for the command and the node."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image
from torch import Tensor

from . import live_plots
from .intervals import Figure

MOST_COLUMNS = 10
WIDTH, CELL = 1280, (128, 256)  # of all pictures of a row, and of one of them, in pixels
MEANING = {
    "retention": "1: nothing lost",
    "sharpness": "fine detail, after / before",
    "few_to_many": "distance of few- to many-step answers, after / before",
    "variety": "distance between noises of one prompt, after / before",
    "drift": "way from the answer before, 1: another picture of the prompt",
    "concept_before": "distance of samples to the own pictures",
    "concept_after": "the same after",
    "gain": "share of that distance that is gone",
}


def in_text(figures: Mapping[str, Figure]) -> str:
    """A line a figure: its name, its value with the interval, what it means."""
    lines = [f"  {name.replace('_', ' '):15}{f'{f:.3f}':>24}   {MEANING[name]}" for name, f in figures.items()]
    return "\n".join(["figure [95 % interval]", *lines])


def picture(figures: Mapping[str, Figure], before: Tensor, after: Tensor) -> Image.Image:
    """Answers before and after, column by column from the same noise: images [N, H, W, 3] in [0, 1], at most ten."""
    before, after = before[:MOST_COLUMNS], after[:MOST_COLUMNS]
    said = [f"{name.replace('_', ' ')} {figures[name].value:.2f}" for name in figures if name in BESIDE]
    rows = [("before", before), ("\n".join(["after", *said]), after)]
    title = f"retention {figures['retention']:.2f}   the same prompt and noise in each column"
    return live_plots.grid(rows, title, min(max(WIDTH // len(before), CELL[0]), CELL[1]))


BESIDE = ("sharpness", "few_to_many", "variety", "drift", "gain")
