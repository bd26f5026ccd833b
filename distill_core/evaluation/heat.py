"""Colours for maps of differences."""

from __future__ import annotations

import torch
from torch import Tensor


def heat_colours(share: Tensor) -> Tensor:
    """[..., H, W] in [0, 1] -> [..., H, W, 3]: black, red, yellow, white."""
    return torch.stack([(3 * share - i).clamp(0, 1) for i in range(3)], -1)


def difference_maps(images: Tensor, reference: Tensor) -> Tensor:
    """The mean absolute difference of the colours at each place: images [..., H, W, 3] -> [..., H, W]."""
    return (images - reference).abs().mean(-1)
