"""Classifier-free guidance of models that edit a picture: of the text and of the picture, each with a strength."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
from torch import Tensor

from ..devices import like
from ..diffusion.process import expand_like
from .denoiser import Cond, Denoiser, Guided, cat_conds
from .items import IMAGE_STRENGTH, REFERENCE, SOURCE_IMAGE, TEXT_STRENGTH, conditions, kind


class GuidedTwice(Guided):
    """none + s_I (picture - none) + s_T (both - picture) (InstructPix2Pix, arXiv 2211.09800, equation 3).

    both is told the text and the picture that is edited, picture the latter alone, and none neither
    (`without_picture`). An item's strengths s_T and s_I [B] are those of its conditioning (`items.TEXT_STRENGTH`,
    `IMAGE_STRENGTH`); where it has none, ``scale`` is that of the text (or ``scales`` [B]) and ``image_scale`` that of
    the picture. All that is asked is one batch, of three times as many rows at most; none is a batch of its own where
    the picture is tokens, of which it then has fewer. With s_I = 1 for all items none is left out, and this is
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
        for _, alike in groupby(asked, _shapes):
            conds = list(alike)
            count = len(conds)
            joined = self.denoiser(torch.cat([x] * count), torch.cat([sigma] * count), cat_conds(conds))
            answers += joined.chunk(count)
        # From the one that is told the least, each difference as often as the strength of what is told more.
        result = answers[-1]
        for (more, less), strength in reversed(list(zip(pairwise(answers), strengths, strict=False))):
            result = result + expand_like(like(strength, more), more) * (more - less)
        return result


def without_picture(cond: Cond) -> Cond:
    """The same with 0 in the place of the picture that is edited, as InstructPix2Pix was trained to do without; one to
    go by has no tokens, as FLUX.1 Kontext was trained to do without (arXiv 2506.15742, section 3)."""
    lacking = {SOURCE_IMAGE: torch.zeros_like, REFERENCE: lambda picture: picture[..., :0, :0]}
    return cond.with_items({k: lacking[kind(k)](v) for k, v in cond.extra.items() if kind(k) in lacking})


def _shapes(cond: Cond) -> list[torch.Size]:
    return [value.shape[1:] for value in conditions(cond.extra).values()]


def guided(denoiser: Denoiser, uncond: Cond, scale: float) -> Guided:
    """Guidance as the denoiser's network can have it: of the text, and of the picture where it edits one."""
    return (GuidedTwice if edits(denoiser) else Guided)(denoiser, uncond, scale)


def edits(denoiser: Denoiser) -> bool:
    """Whether its network takes a picture to edit, or can be shown one to go by."""
    limits = denoiser.backend.limits()
    return limits.references or not {SOURCE_IMAGE, REFERENCE}.isdisjoint(limits.items)
