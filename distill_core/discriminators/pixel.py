"""ADD's discriminator: trainable heads on the tokens of a frozen vision network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..devices import like
from ..models.denoiser import Cond
from ..models.precision import on_device
from ..models.vision import VisionNetwork, image_embedding

NEIGHBOURS = 9  # tokens that a head's second block sees at once, in a circle


def spectral_conv1d(channels: int, out: int, kernel: int) -> nn.Module:
    """1-D convolution with circular padding and spectral normalisation (Miyato et al. 2018), one power iteration."""
    conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
    return spectral_norm(conv, eps=1e-12)


class TokenBlock(nn.Module):
    """act(conv(x)) with a spectrally normalised convolution over the sequence of tokens."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = spectral_conv1d(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), 0.2)


class TokenHead(nn.Module):
    """Tokens [B, C, N] and conditioning [B, cond_dim] -> logits [B, N].

    The head that ADD takes from StyleGAN-T (Sauer et al. 2023, section 3.2): a block over single tokens, a residual
    block over nine neighbours, and a projection of ``width`` channels on the conditioning. Instead of batch statistics,
    which would let the items of a batch influence each other, tokens are standardised once and for all by ``mean`` and
    ``std`` [C], those of real images.
    """

    mean: Tensor  # [1, C, 1]
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, cond_dim: int, width: int = 64) -> None:
        super().__init__()
        channels = len(mean)
        self.register_buffer("mean", mean.view(1, -1, 1).clone())
        self.register_buffer("std", std.view(1, -1, 1).clone())
        self.single, self.neighbours = TokenBlock(channels, 1), TokenBlock(channels, NEIGHBOURS)
        self.logit = spectral_conv1d(channels, width, 1)
        self.projection = nn.Linear(cond_dim, width)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        x = self.single((tokens - self.mean) / self.std)
        x = self.logit((self.neighbours(x) + x) / math.sqrt(2))
        return torch.einsum("bcn,bc->bn", x, self.projection(cond)) / math.sqrt(x.shape[1])


def text_embedding(cond: Cond) -> Tensor:
    """One vector [B, P] a prompt: the pooled text where the model has one, else the mean of its tokens."""
    if cond.pooled is not None:
        return cond.pooled
    if cond.mask is None:
        return cond.context.mean(1)
    mask = like(cond.mask, cond.context).unsqueeze(2)
    return (cond.context * mask).sum(1) / mask.sum(1)


class PixelDiscriminator(nn.Module):
    """ADD's trainable heads on the tokens of a frozen vision network, conditioned on text and image (section 3.2).

    real: tokens [B, C_k, N_k] of a few real images, which give each tap's width, mean and deviation.
    text_dim, image_dim: sizes of the two embeddings, which are concatenated before the projection; 0 leaves one out.
    ``forward(tokens, text, image)``: tokens [B, C_k, N_k], text [B, text_dim], image [B, image_dim] -> logits [B, N],
    N = heads * max N_k: the logits of taps with fewer tokens are repeated, so that every head weighs the same.
    """

    def __init__(self, real: Sequence[Tensor], text_dim: int, image_dim: int, width: int = 64) -> None:
        super().__init__()
        self.text_dim, self.image_dim = text_dim, image_dim
        cond_dim = text_dim + image_dim or 1
        moments = [torch.std_mean(tokens.detach().float(), dim=(0, 2)) for tokens in real]
        self.heads = nn.ModuleList(TokenHead(mean, std + 1e-3 * std.max(), cond_dim, width) for std, mean in moments)

    @classmethod
    @torch.no_grad()
    def for_images(
        cls, vision: VisionNetwork, images: Tensor, cond: Cond, *, with_text: bool = True, with_image: bool = True
    ) -> PixelDiscriminator:
        """Heads that fit the vision network's taps on ``images`` [B, 3, h, w], real ones with their conditioning.

        Raises ValueError for images so small that a map has too few tokens.
        """
        tokens = vision(images)
        least = min(part.shape[2] for part in tokens)
        if least < NEIGHBOURS // 2:
            height, width = vision.prepare(images).shape[2:]
            raise ValueError(
                f"the vision network sees images of {width} x {height} px as {least} tokens, and its heads need at "
                f"least {NEIGHBOURS // 2}: set [vision] size to 32 or more"
            )
        text = text_embedding(cond).shape[1] if with_text else 0
        image = image_embedding(tokens).shape[1] if with_image else 0
        made = cls(tokens, text, image)
        on_device(made, images.device)
        return made

    def forward(self, tokens: Sequence[Tensor], text: Tensor, image: Tensor) -> Tensor:
        with torch.autocast(text.device.type, enabled=False):  # logits that differ little must still differ
            return self._logits(tokens, text, image)

    def _logits(self, tokens: Sequence[Tensor], text: Tensor, image: Tensor) -> Tensor:
        dtype = next(self.heads.parameters()).dtype
        parts = [part.to(dtype) for part, dim in ((text, self.text_dim), (image, self.image_dim)) if dim]
        cond = torch.cat(parts, dim=1) if parts else text.new_ones(len(text), 1).to(dtype)
        logits = [head(t.to(dtype), cond) for head, t in zip(self.heads, tokens, strict=True)]
        most = max(part.shape[1] for part in logits)
        return torch.cat([F.interpolate(part.unsqueeze(1), most).squeeze(1) for part in logits], dim=1)
