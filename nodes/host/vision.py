"""A CLIP_VISION of the host as the frozen network under ADD's heads."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.clip_vision
import torch
from torch import Tensor, nn

from ...distill_core.models.features import OutOfPlace
from ...distill_core.models.vision import VisionNetwork, evenly

BLOCKS = 4  # tapped, evenly spread, the last among them


@dataclass(frozen=True)
class Kind:
    """One of the host's image encoders: where its blocks are, and how many tokens come before the patches.

    size: of its square input, 0 for the only one it takes (its positions are not interpolated).
    """

    blocks: str
    prefix_tokens: int
    size: int = 0


KINDS = {
    "dinov2": Kind("encoder.layer", 1, 224),
    "dinov3": Kind("layer", 1, 224),  # and its registers
    "clip_vision_model": Kind("vision_model.encoder.layers", 1),
    "siglip_vision_model": Kind("vision_model.encoder.layers", 0),
    "siglip2_vision_model": Kind("vision_model.encoder.layers", 0, 224),
}


class WithGradient(nn.Module):
    """CLIP's blocks add to their input in place, which would break the gradient through the taps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor):
        with OutOfPlace():
            return self.inner(images)


def vision_network(clip_vision, size: int, device: torch.device, dtype: torch.dtype) -> VisionNetwork:
    """A copy of it that gradients can pass, tapped at `BLOCKS` blocks.

    size: side of its input, 0 for its usual one.  Raises ValueError for a network or size that cannot serve.
    """
    kind = KINDS.get(clip_vision.model_type)
    if kind is None:
        raise ValueError(f"a {clip_vision.model_type} cannot serve as clip_vision; known: {', '.join(KINDS)}")
    config = clip_vision.config
    patch, own = config["patch_size"], config.get("image_size", 224)
    if size and not kind.size and size != own:
        raise ValueError(f"vision_size {size}: this clip_vision only takes images of {own} px; set it to 0")
    size = size or kind.size or own
    if size % patch:
        raise ValueError(f"vision_size {size} must be a multiple of this clip_vision's patch, {patch}")
    copied = comfy.clip_vision.ClipVisionModel(config)
    copied.load_sd({name: value.detach().clone() for name, value in clip_vision.get_sd().items()})
    network = WithGradient(copied.model.to(device, dtype))
    count = len(network.get_submodule(f"inner.{kind.blocks}"))
    taps = evenly([f"inner.{kind.blocks}.{i}" for i in range(count)], BLOCKS)
    prefix = kind.prefix_tokens + config.get("num_register_tokens", 0)
    return VisionNetwork(network, taps, (size, size), clip_vision.image_mean, clip_vision.image_std, prefix)
