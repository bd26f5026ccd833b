"""Classifier-free guidance of models that edit a picture: of the text and of the picture, each with a strength."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..devices import like
from ..diffusion.process import expand_like
from .denoiser import Cond, Denoiser, Guided, cat_conds
from .items import IMAGE_STRENGTH, SOURCE_IMAGE, TEXT_STRENGTH


class GuidedTwice(Guided):
    """none + s_I (picture - none) + s_T (both - picture) (InstructPix2Pix, arXiv 2211.09800, equation 3).

    both is told the text and the picture that is edited, picture the latter alone, and none neither: its picture is 0.
    An item's strengths s_T and s_I [B] are those of its conditioning (`items.TEXT_STRENGTH`, `IMAGE_STRENGTH`); where
    it has none, ``scale`` is that of the text (or ``scales`` [B]) and ``image_scale`` that of the picture. All that is
    asked is one batch, of three times as many rows at most: with s_I = 1 for all items none is left out, and this is
    `Guided`; with s_T = s_I picture is; with both 1 it is the denoiser itself.
    """

    def __init__(
        self, denoiser: Denoiser, uncond: Cond, scale: float, scales: Tensor | None = None, image_scale: float = 1.0
    ) -> None:
        super().__init__(denoiser, uncond, scale, scales)
        self.image_scale = image_scale

    def strengths(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Those of the text and of the picture, [B] each, on the CPU."""
        text = self.scale if self.scales is None else self.scales.cpu()
        found = (cond.extra.get(TEXT_STRENGTH, text), cond.extra.get(IMAGE_STRENGTH, self.image_scale))
        text, image = (torch.as_tensor(value, dtype=torch.float32).expand(len(cond)) for value in found)
        return text, image

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self._guided(x, sigma, cond)

    def around(self, with_text: Tensor, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The guided answer where the denoiser's own, with text and picture, is known."""
        return self._guided(x, sigma, cond, with_text)

    def _guided(self, x: Tensor, sigma: Tensor, cond: Cond, both: Tensor | None = None) -> Tensor:
        text, image = self.strengths(cond)
        without_text = self.uncond.rows_for(cond)
        asked, strengths = [] if both is not None else [cond], [text]
        if (text != image).any():
            asked.append(without_text)
            strengths.append(image)
        if (image != 1).any():
            asked.append(without_picture(without_text))
        answers = [] if both is None else [both]
        if asked:
            count = len(asked)
            joined = self.denoiser(torch.cat([x] * count), torch.cat([sigma] * count), cat_conds(asked))
            answers += joined.chunk(count)
        # From the one that is told the least, each difference as often as the strength of what is told more.
        result = answers[-1]
        for (more, less), strength in reversed(list(zip(pairwise(answers), strengths, strict=False))):
            result = result + expand_like(like(strength, more), more) * (more - less)
        return result


def without_picture(cond: Cond) -> Cond:
    """The same with 0 in the place of the picture that is edited, as InstructPix2Pix was trained to do without."""
    return cond.with_items({k: torch.zeros_like(v) for k, v in cond.extra.items() if k == SOURCE_IMAGE})


def guided(denoiser: Denoiser, uncond: Cond, scale: float) -> Guided:
    """Guidance as the denoiser's network can have it: of the text, and of the picture where it edits one."""
    return (GuidedTwice if edits(denoiser) else Guided)(denoiser, uncond, scale)


def edits(denoiser: Denoiser) -> bool:
    """Whether its network takes a picture to edit."""
    return SOURCE_IMAGE in denoiser.backend.limits().items
