"""A CLIP_VISION of the host as the frozen network under ADD's heads."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.clip_vision
import torch
from torch import Tensor, nn

from ...distill_core.models.features import OutOfPlace
from ...distill_core.models.vision import VisionNetwork, evenly

BLOCKS = 4  # whose features are read: evenly spaced, the last among them


@dataclass(frozen=True)
class Encoder:
    """One of the host's image encoders."""

    blocks: str  # the module that holds them
    prefix_tokens: int  # before the patches
    size: int = 0  # usual side of its square input; 0 if it takes only one (its positions are not interpolated)


ENCODERS = {
    "dinov2": Encoder("encoder.layer", 1, 224),
    "dinov3": Encoder("layer", 1, 224),  # and its registers
    "clip_vision_model": Encoder("vision_model.encoder.layers", 1),
    "siglip_vision_model": Encoder("vision_model.encoder.layers", 0),
    "siglip2_vision_model": Encoder("vision_model.encoder.layers", 0, 224),
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
    """A copy of the CLIP_VISION that gradients can pass, whose features are read at `BLOCKS` blocks.

    size: side of its input, 0 for its usual one.  Raises ValueError for a network or size that cannot serve.
    """
    encoder = ENCODERS.get(clip_vision.model_type)
    if encoder is None:
        raise ValueError(f"a {clip_vision.model_type} cannot serve as clip_vision; known: {', '.join(ENCODERS)}")
    config = clip_vision.config
    patch, own_size = config["patch_size"], config.get("image_size", 224)
    if size and not encoder.size and size != own_size:
        raise ValueError(f"vision_size {size}: this clip_vision only takes images of {own_size} px; set it to 0")
    size = size or encoder.size or own_size
    if size % patch:
        raise ValueError(f"vision_size {size} must be a multiple of this clip_vision's patch, {patch}")
    copied = comfy.clip_vision.ClipVisionModel(config)
    copied.load_sd({name: value.detach().clone() for name, value in clip_vision.get_sd().items()})
    network = WithGradient(copied.model.to(device, dtype))
    count = len(network.get_submodule(f"inner.{encoder.blocks}"))
    taps = evenly([f"inner.{encoder.blocks}.{i}" for i in range(count)], BLOCKS)
    prefix = encoder.prefix_tokens + config.get("num_register_tokens", 0)
    return VisionNetwork(network, taps, (size, size), clip_vision.image_mean, clip_vision.image_std, prefix)
