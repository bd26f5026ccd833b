"""The guidance strengths at which a teacher that edits pictures samples each item: fixed, or drawn for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..diffusion.noise import ItemNoise
from ..files import DTYPES
from ..models.items import IMAGE_STRENGTH, TEXT_STRENGTH

Span = Sequence[float]  # one number, or the lowest and the highest


def check_span(name: str, span: Span) -> None:
    """Raises ValueError for what is neither nothing, a number, nor a lowest and a highest one."""
    if len(span) > 2 or list(span) != sorted(span):
        raise ValueError(f"{name} must be one number, or the lowest and the highest, not {list(span)}")


def draw_strengths(
    text: Span, image: Span, seed: int, items: Sequence[int], dtype: str = "float32"
) -> dict[str, Tensor]:
    """The strengths [B] of the items by their names in a conditioning, each from the item's own generator.

    dtype: number format in which they are stored, to which they are rounded: the teacher takes what the file will say.
    """
    random = ItemNoise(seed, items)
    drawn = {}
    for name, span in ((TEXT_STRENGTH, text), (IMAGE_STRENGTH, image)):
        low, high = span[0], span[-1]
        values = low + (high - low) * random.named(name).uniform()
        drawn[name] = values.to(DTYPES[dtype]).float()
    return drawn
