"""What a training item may have besides its latent, its text and the states of the teacher's path: declared once.

Datasets are written, read, batched and mixed by `ITEM_TENSORS`, and a network names what it takes from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXTRA = "extra."  # before the names of a conditioning's further tensors, in files
SAME, NUMBER = -1, 0


@dataclass(frozen=True)
class ItemTensor:
    """A tensor that belongs to one item, whose latent is [C, H, W].

    what: it in words.  channels: so many at the latent's height and width, SAME for C, NUMBER for a single number.
    condition: whether networks are told it (``Cond.extra``), or it is learnt from as the latent is (``Batch.beside``).
    of_any_size: whether its height and width are its own.  low, high: of its values.
    """

    what: str
    channels: int
    condition: bool = True
    of_any_size: bool = False
    low: float = -math.inf
    high: float = math.inf

    def shape(self, latent: Sequence[int], any_size: Sequence[int] = (-1, -1)) -> tuple[int, ...]:
        """Its shape beside a latent [C, H, W]; ``any_size`` for sides that may be any."""
        if self.channels == NUMBER:
            return ()
        sides = tuple(any_size if self.of_any_size else latent[1:])
        return (latent[0] if self.channels == SAME else self.channels, *sides)


MASK, MASKED_IMAGE, SOURCE_IMAGE, REJECTED = "inpaint_mask", "masked_image", "source_image", "rejected"
PIXEL_MASK, TEXT_STRENGTH, IMAGE_STRENGTH = "pixel_mask", "text_strength", "image_strength"
REFERENCE = "reference_image"
PIXELS = 8  # a side of a latent's position, in the pixels of a mask for FLUX.1 Fill

ITEM_TENSORS = {
    MASK: ItemTensor("a mask, 1 where the picture is to be filled", 1, low=0, high=1),
    PIXEL_MASK: ItemTensor("the same of each pixel, 8 x 8 to a position of the latent", PIXELS**2, low=0, high=1),
    MASKED_IMAGE: ItemTensor("the latent of the picture without what the mask hides", SAME),
    SOURCE_IMAGE: ItemTensor("the latent of the picture that is to be edited", SAME),
    REFERENCE: ItemTensor("the latent of a picture to go by; several are reference_image#0, #1", SAME, True, True),
    TEXT_STRENGTH: ItemTensor("the guidance scale of the text", NUMBER, low=0),
    IMAGE_STRENGTH: ItemTensor("the guidance scale of the picture that is edited", NUMBER, low=0),
    REJECTED: ItemTensor("a latent of the same text that was found the worse one", SAME, condition=False),
}


def kind(name: str) -> str:
    """Which of `ITEM_TENSORS` a tensor is, of one that may be several: reference_image#1 is a reference_image."""
    return name.partition("#")[0]


def of_file(name: str) -> ItemTensor | None:
    """The declaration of a tensor by its name in a file; None for one that is not declared."""
    found = ITEM_TENSORS.get(kind(name.removeprefix(EXTRA)))
    return found if found is not None and found.condition == name.startswith(EXTRA) else None


def conditions(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a conditioning's further tensors that are declared here."""
    return {name: value for name, value in extra.items() if of_file(EXTRA + name) is not None}


def conditions_in(names: Iterable[str]) -> list[str]:
    """Names of the declared conditions among the tensors of a file, in order."""
    return sorted(name.removeprefix(EXTRA) for name in names if name.startswith(EXTRA) and of_file(name) is not None)


def wrong_shape(shapes: Mapping[str, Sequence[int]]) -> str:
    """What is wrong with the shapes of a file's tensors, batch first, latents [N, C, H, W] among them; else empty."""
    latent = list(shapes["latents"])[1:]
    for name, (_, *found) in shapes.items():
        item = of_file(name)
        if item is None:
            continue
        wanted = list(item.shape(latent))
        if len(found) != len(wanted) or any(w not in (-1, f) for f, w in zip(found, wanted, strict=True)):
            spelt = str(wanted).replace("-1", "any")
            return f"{name} is {found} for an item with a latent {latent}, and {item.what}, is {spelt}"
    return ""


def wrong_values(tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the values of a file's tensors; else empty."""
    for name, value in tensors.items():
        item = of_file(name)
        if item is None or (math.isinf(item.low) and math.isinf(item.high)):
            continue
        low, high = value.min().item(), value.max().item()
        if not item.low <= low <= high <= item.high:
            range_ = f"at least {item.low:g}" if math.isinf(item.high) else f"from {item.low:g} to {item.high:g}"
            return f"{name} has values from {low:g} to {high:g}, and {item.what}, is {range_}"
    return ""


def missing(names: Sequence[str], there: Mapping[str, Tensor]) -> str:
    """Which of the tensors ``names`` are not there, in words; else empty."""
    lacking = [name for name in names if name not in there]
    return " and ".join(f"{name} ({ITEM_TENSORS[name].what})" for name in lacking)


def hole(extra: Mapping[str, Tensor]) -> Tensor | None:
    """Where items are to be filled, [B, 1, H, W] at the latents' size: 1 where any pixel is. None for items without a
    mask."""
    mask = extra.get(MASK, extra.get(PIXEL_MASK))
    return None if mask is None else mask.amax(1, keepdim=True)


def filled(result: Tensor, pictures: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
    """Latents [B, C, H, W] of what a model made of items, and of the items' pictures where there is nothing to fill."""
    mask = hole(extra)
    return result if mask is None else torch.where(mask.to(result.device) > 0, result, pictures.to(result))
