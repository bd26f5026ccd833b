"""Shapes at full size: of a network's latents at 1024 px (SD 1.5: 512) and of its text. No host is needed for them."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """latent: [C, H, W].  width, tokens: of the text's rows.  pooled: width of the pooled text, 0 for none."""

    latent: tuple[int, int, int]
    width: int
    tokens: int
    pooled: int = 0


SHAPES = {
    "sd15": Shape((4, 64, 64), 768, 77),
    "sdxl": Shape((4, 128, 128), 2048, 77, 1280),
    "sdxl 512": Shape((4, 64, 64), 2048, 77, 1280),
    "sd35m": Shape((16, 128, 128), 4096, 154, 2048),
    "schnell": Shape((16, 128, 128), 4096, 256, 768),
    "flux": Shape((16, 128, 128), 4096, 256, 768),
    "klein": Shape((128, 64, 64), 7680, 512),
    "chroma": Shape((16, 128, 128), 4096, 256),
    "zimage": Shape((16, 128, 128), 2560, 128),
    "qwen": Shape((16, 128, 128), 3584, 128),
    "wan": Shape((16, 128, 128), 4096, 512),
}
