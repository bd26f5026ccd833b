"""Pictures of the student while it trains, always of the same prompts and from the same noise.

Of items with a mask they are the items' own pictures, filled where the mask says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.samplers import sample
from ..diffusion.schedules import explicit_sigmas
from ..models.denoiser import Cond, Guided
from ..models.items import MASKED_IMAGE, REFERENCE, SOURCE_IMAGE, filled
from ..training.loop import Run
from ..training.student import StudentConfig
from . import live_plots

MOST = 6  # pictures in a row
GIVEN = {MASKED_IMAGE: "to fill", SOURCE_IMAGE: "to edit", REFERENCE: "to edit"}  # what a model is shown, in words


class StudentPictures:
    """Called while a run trains, it gives a row of pictures of the averaged student at its levels.

    conds: of one row each; the first six are used.  decode: a list of latents [1, C, H, W] in model space -> images
    [N, H, W, 3] in [0, 1].  items: of these conds, with the latents of their pictures.
    """

    def __init__(
        self,
        run: Run,
        student: StudentConfig,
        conds: Sequence[Cond],
        decode: Callable[[Sequence[Tensor]], Tensor],
        items: Batch | None = None,
    ) -> None:
        self.run, self.decode = run, decode
        self.conds = [cond.to(run.device) for cond in conds[:MOST]]
        self.sampler: dict[str, Any] = {"sampler": student.sampler, **student.sampler_options}
        self.taken: list[Tensor] | None = None
        self.items = None if items is None else items.to(run.device)
        self.given: list[tuple[str, Tensor]] = []  # rows above the student's, once they are decoded
        self.uncond, self.cfg = run.dataset.uncond().to(run.device), student.cfg

    @torch.no_grad()
    def latents(self) -> list[Tensor]:
        """What the student makes now, [1, C, H, W] each. Where its weights are shared out, all processes must ask."""
        run, student = self.run, Guided(self.run.method.student, self.uncond, self.cfg)
        shape = run.dataset.shapes[0]
        sigmas = explicit_sigmas(run.method.levels_at(shape[1:]))
        with run.ema_weights():
            return [
                sample(student, student.process, sigmas, cond, shape, seed=0, items=[item], **self.sampler)
                for item, cond in enumerate(self.conds)
            ]

    @classmethod
    def of_items(
        cls, run: Run, student: StudentConfig, items: Batch, decode: Callable[[Sequence[Tensor]], Tensor]
    ) -> StudentPictures:
        """Of at most six items of a dataset: prompts that need no text encoder."""
        conds = [items.cond[[row]] for row in range(len(items.latents))]
        return cls(run, student, conds, decode, items)

    def take(self) -> None:
        """Make the latents of the next picture beforehand."""
        self.taken = self.latents()

    @torch.no_grad()
    def __call__(self) -> Image.Image:
        latents, self.taken = self.latents() if self.taken is None else self.taken, None
        if self.items is not None:
            pictures, conds = self.items.latents.split(1), self.conds
            latents = [filled(x, own, cond.extra) for x, own, cond in zip(latents, pictures, conds, strict=True)]
            if not self.given:
                shown = {text: [cond.extra[name] for cond in conds] for name, text in given(conds[0]).items()}
                self.given = [(text, self.decode(row)) for text, row in shown.items()]
        steps = len(explicit_sigmas(self.run.method.levels)) - 1
        return live_plots.grid([*self.given, (f"student, {steps} steps", self.decode(latents))])


def given(cond: Cond) -> dict[str, str]:
    """The pictures among an item's per-item tensors, with what is said of them."""
    return {name: text for name, text in GIVEN.items() if name in cond.extra}


def first_items(run: Run) -> Batch:
    """At most six items of the first batch that a run learns from; of those with tensors of their own, in one size."""
    shape = run.dataset.shapes[0]  # that of the pictures, and so of their per-item tensors
    batches = (run.dataset.batch(number, run.batch_size, run.config.seed) for number in count())
    batch = next(batch for batch in batches if not run.dataset.conditions or tuple(batch.latents.shape[1:]) == shape)
    rows = list(range(min(MOST, len(batch.latents))))
    return Batch(batch.latents[rows], batch.cond[rows])
