"""The averaged student on the items that are held out, with noise that never changes: one figure, in the run's log."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import same_level
from .loop import Event, Run, autocast


class Validation:
    """A listener of `train` that adds ``validation`` to a step's logs: after the first, every N-th and the last step.

    It is the mean squared distance between the answer of the averaged student and the latent, over the items held out
    and the student's levels. The student starts from the teacher's state where the dataset keeps one at that level,
    which makes it the pairs term on unseen paths; elsewhere from the latent, noised. In pure noise nothing of a latent
    is left, so without a state the highest level does not count. A run that holds nothing out is left alone.
    Raises ValueError where no level counts.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.every = run, run.config.validation_every
        starts = (start for batch, random in self._batches() for start in self._starts(batch, random))
        if run.held_out and next(starts, None) is None:
            raise ValueError(
                "validation has nothing to measure: this student only knows pure noise, and the items held out have "
                "no pairs at that level (state_sigmas, or pairs_for_steps in Teacher Latents); set validation to 0"
            )

    def __call__(self, event: Event) -> None:
        due = event.step == 1 or event.step % self.every == 0 or event.step == event.steps
        if due and self.run.held_out:
            event.logs["validation"] = self.loss()

    @torch.no_grad()
    def loss(self) -> float:
        """The figure now."""
        run, errors = self.run, []
        with run.ema_weights(), autocast(run):
            for batch, random in self._batches():
                for sigma, x in self._starts(batch, random):
                    answer = run.method.student(x, sigma, batch.cond)
                    errors.append((answer.float() - batch.latents).square().mean((1, 2, 3)))
        return torch.cat(errors).mean().item()

    def _batches(self) -> Iterator[tuple[Batch, ItemNoise]]:
        """The items held out, in batches of one bucket, each with its own noise."""
        held_out, size, number = self.run.held_out, self.run.rows.stop - self.run.rows.start, 0
        if held_out is None:
            return
        for bucket in held_out.buckets.values():
            for start in range(0, len(bucket), size):
                items = bucket[start : start + size]
                random = ItemNoise(self.run.config.seed, range(number, number + len(items)), "validation")
                number += len(items)
                yield held_out.read(items).to(self.run.device), random

    def _starts(self, batch: Batch, random: ItemNoise) -> Iterator[tuple[Tensor, Tensor]]:
        """Levels [B] and where the student starts there [B, C, H, W]."""
        process, latents = self.run.method.student.process, batch.latents
        noise = random.normal_like(latents)
        for level in self.run.method.levels:
            sigma = latents.new_full((len(latents),), level)
            stored = [i for i, s in enumerate(batch.state_sigmas) if same_level(s, level)]
            if batch.states is not None and stored:
                yield sigma, batch.states[:, stored[0]]
            elif level < process.sigma_max * (1 - 1e-4):
                yield sigma, process.noise_scaling(sigma, noise, latents)
