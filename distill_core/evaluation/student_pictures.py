"""Pictures of the student while it trains, always of the same prompts and from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.samplers import sample
from ..diffusion.schedules import explicit_sigmas
from ..models.denoiser import Cond, Guided
from ..training.loop import Run
from ..training.student import StudentConfig
from . import live_plots

MOST = 6  # pictures in a row


class StudentPictures:
    """Called while a run trains, it gives a row of pictures of the averaged student at its levels.

    conds: of one row each; the first six are used.  decode: a list of latents [1, C, H, W] in model space -> images
    [N, H, W, 3] in [0, 1].
    """

    def __init__(
        self, run: Run, student: StudentConfig, conds: Sequence[Cond], decode: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        self.run, self.decode = run, decode
        self.conds = [cond.to(run.device) for cond in conds[:MOST]]
        self.sampler: dict[str, Any] = {"sampler": student.sampler, **student.sampler_options}
        self.taken: list[Tensor] | None = None
        self.uncond, self.cfg = run.dataset.uncond().to(run.device), student.cfg

    @torch.no_grad()
    def latents(self) -> list[Tensor]:
        """What the student makes now, [1, C, H, W] each. Where its weights are shared out, all processes must ask."""
        run, student = self.run, Guided(self.run.method.student, self.uncond, self.cfg)
        shape, sigmas = run.dataset.shapes[0], explicit_sigmas(run.method.levels)
        with run.ema_weights():
            return [
                sample(student, student.process, sigmas, cond, shape, seed=0, items=[item], **self.sampler)
                for item, cond in enumerate(self.conds)
            ]

    def take(self) -> None:
        """Make the latents of the next picture beforehand."""
        self.taken = self.latents()

    @torch.no_grad()
    def __call__(self) -> Image.Image:
        latents, self.taken = self.latents() if self.taken is None else self.taken, None
        steps = len(explicit_sigmas(self.run.method.levels)) - 1
        return live_plots.grid([(f"student, {steps} steps", self.decode(latents))])


def of_dataset(run: Run) -> list[Cond]:
    """Conditionings of the first batch that a run learns from, of the pictures' size where its items have tensors of
    their own: prompts that need no text encoder."""
    shape = run.dataset.shapes[0]  # that of the pictures, and so of their per-item tensors
    batches = (run.dataset.batch(number, run.config.batch_size, run.config.seed) for number in count())
    batch = next(batch for batch in batches if not run.dataset.conditions or tuple(batch.latents.shape[1:]) == shape)
    return [batch.cond[[row]] for row in range(min(MOST, len(batch.latents)))]
