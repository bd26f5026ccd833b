"""Pictures of a run drawn with Pillow alone: quick enough for a live preview, and ComfyUI has no matplotlib.

The headless commands use `plots`, which says the same with matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .plots import line, panels

COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
INK, GREY, PALE = (40, 40, 40), (120, 120, 120), (225, 225, 225)


def _font(size: int):
    return ImageFont.load_default(size)


def _pale(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (255 - (255 - c) // 4 for c in colour)
    return red, green, blue


def curves(logs: Sequence[dict[str, float]], width: int = 860, height: int = 480, title: str = "") -> Image.Image:
    """Losses, discriminator accuracy, logit gap and gradient norms over steps, those that there are: raw values pale,
    smoothed strong.

    logs: the steps' logs in order, as `training.run_folder.RunFolder.logs` gives them.
    width, height: of the whole picture in pixels.
    """
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    top = 22 if title else 0
    draw.text((8, 4), title, INK, _font(14))
    found = {name: {key: line(logs, key) for key in keys} for name, keys in panels(logs)}
    drawn = {name: {key: lines for key, lines in series.items() if lines[0]} for name, series in found.items()}
    drawn = {name: series for name, series in drawn.items() if series} or drawn  # without a discriminator: two panels
    panel_width, panel_height = width // 2, (height - top) // math.ceil(len(drawn) / 2)
    for index, (name, series) in enumerate(drawn.items()):
        box = (index % 2 * panel_width, top + index // 2 * panel_height, panel_width, panel_height)
        _panel(draw, box, name, series, (0.0, 1.0) if name == "discriminator accuracy" else None)
    return image


def _panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    title: str,
    series: dict[str, tuple[list[float], list[float]]],
    fixed: tuple[float, float] | None,
) -> None:
    x, y, width, height = box
    left, right, upper, lower = x + 48, x + width - 10, y + 24, y + height - 20
    draw.text((x + 8, y + 4), title, INK, _font(12))
    draw.rectangle((left, upper, right, lower), outline=PALE)
    if not series:
        return
    raw, strong = {key: lines[0] for key, lines in series.items()}, {key: lines[1] for key, lines in series.items()}
    low, high = fixed or _range([v for values in strong.values() for v in values[len(values) // 50 :]])
    count = max(map(len, raw.values()))

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        shown = range(0, len(values), max(1, len(values) // (right - left)))
        share = [min(1.0, max(0.0, (values[i] - low) / (high - low))) for i in shown]
        return [
            (left + (right - left) * i / max(1, count - 1), lower - s * (lower - upper))
            for i, s in zip(shown, share, strict=True)
        ]

    for level in (low, (low + high) / 2, high):
        at = lower - (level - low) / (high - low) * (lower - upper)
        draw.line((left, at, right, at), PALE)
        draw.text((left - 4, at), f"{level:.3g}", GREY, _font(10), anchor="rm")
    draw.text((right, lower + 3), f"step {count}", GREY, _font(10), anchor="rt")
    label: float = right
    for lines, width, tint in ((raw, 1, _pale), (strong, 2, lambda colour: colour)):
        for values, colour in zip(lines.values(), cycle(COLOURS), strict=False):
            if len(values) > 1:
                draw.line(points(values), tint(colour), width)
    for key, colour in zip(series, cycle(COLOURS), strict=False):
        text = f"{key.replace('_', ' ')} {strong[key][-1]:.3g}"
        draw.text((label, y + 5), text, colour, _font(11), anchor="rt")
        label -= draw.textlength(text, _font(11)) + 10


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits that hold every finite value, with a little air."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - air, high + air


def grid(rows: Sequence[tuple[str, Tensor]], title: str = "", cell: int = 128) -> Image.Image:
    """One labelled row of pictures [N, H, W, 3] in [0, 1] per entry, every picture fitted into ``cell`` pixels."""
    label, top = 170, 26 if title else 6
    count = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (label + count * (cell + 4), top + len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), title, INK, _font(14))
    for row, (text, images) in enumerate(rows):
        y = top + row * (cell + 4)
        draw.multiline_text((label - 8, y + cell / 2), text, INK, _font(13), anchor="rm", align="right")
        for column, pixels in enumerate(images):
            picture = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy())
            scale = cell / max(picture.size)
            fitted = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
            canvas.paste(fitted, (label + column * (cell + 4), y))
    return canvas


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures under each other, on white."""
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    return canvas
