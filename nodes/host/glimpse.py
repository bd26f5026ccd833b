"""A rough picture of latents, by the host's table of what each channel looks like: without a VAE, at no cost."""

from __future__ import annotations

from latent_preview import Latent2RGBPreviewer
from PIL import Image
from torch import Tensor

SIDE, MOST = 160, 4  # of a picture in pixels; pictures in a row


def glimpse(layout, latents: Tensor | None) -> tuple[str, Image.Image, int] | None:
    """The first latents [N, C, H, W] in model space in a row, as the host takes previews; None without a table.

    layout: the model's latent format.
    """
    if latents is None or layout.latent_rgb_factors is None or latents.shape[1] != layout.latent_channels:
        return None
    reshape = getattr(layout, "latent_rgb_factors_reshape", None)
    previewer = Latent2RGBPreviewer(layout.latent_rgb_factors, layout.latent_rgb_factors_bias, reshape)
    pictures = [previewer.decode_latent_to_preview(latent.float().unsqueeze(0)) for latent in latents[:MOST]]
    row = Image.new("RGB", (SIDE * len(pictures), SIDE))
    for place, picture in enumerate(pictures):
        scale = SIDE / max(picture.size)
        row.paste(picture.resize([max(1, round(side * scale)) for side in picture.size]), (SIDE * place, 0))
    return "JPEG", row, row.width
