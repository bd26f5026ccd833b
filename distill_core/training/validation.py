"""The averaged student on the items that are held out, with noise that never changes: a figure in the run's log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..data.epochs import items_in
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import same_level
from ..methods.base import StudentMethod
from .loop import Event, Run, autocast


class Validation:
    """A listener of `train` that adds ``validation`` to a step's logs: after the first, every N-th and the last step.

    It is the mean squared distance between the answer of the averaged student and the latent, over the items held out
    and the student's levels. The student starts from the teacher's state where the dataset keeps one at that level,
    which makes it the pairs term on unseen paths; elsewhere from the latent, noised. In pure noise nothing of a latent
    is left, so without a state the highest level does not count. A method may measure something else
    (`StudentMethod.held_out_figures`). A run that holds nothing out is left alone.
    Raises ValueError where no level counts.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.every = run, run.config.validation_every
        measures_own = type(run.method).held_out_figures is not StudentMethod.held_out_figures
        starts = (start for batch, random in self._batches() for start in self._starts(batch, random))
        if run.held_out and not measures_own and next(starts, None) is None:
            raise ValueError(
                "validation has nothing to measure: this student only knows pure noise, and the items held out have "
                "no pairs at that level (state_sigmas, or pairs_for_steps in Teacher Latents); set validation to 0"
            )

    def __call__(self, event: Event) -> None:
        due = event.step == 1 or event.step % self.every == 0 or event.step == event.steps
        if due and self.run.held_out:
            event.logs.update(self.figures())

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """What is measured now, by name; ``validation`` is among them."""
        run, found = self.run, defaultdict(list)
        with run.ema_weights(), autocast(run):
            for batch, random in self._batches():
                own = run.method.held_out_figures(batch, random)
                for name, values in (own or {"validation": self._errors(batch, random)}).items():
                    found[name].append(values)
        return {name: torch.cat(parts).mean().item() for name, parts in found.items()}

    def _errors(self, batch: Batch, random: ItemNoise) -> Tensor:
        """The squared distances at all levels that count, one after the other."""
        errors = []
        for sigma, x in self._starts(batch, random):
            answer = self.run.method.student(x, sigma, batch.cond)
            errors.append((answer.float() - batch.latents).square().mean((1, 2, 3)))
        return torch.cat([batch.latents.new_zeros(0), *errors])

    def _batches(self) -> Iterator[tuple[Batch, ItemNoise]]:
        """The items held out, in batches of one bucket, each with its own noise."""
        held_out, number = self.run.held_out, 0
        if held_out is None:
            return
        for key, bucket in held_out.buckets.items():
            size = items_in(self.run.batch_size, key) // self.run.part[1]
            for start in range(0, len(bucket), size):
                items = bucket[start : start + size]
                random = ItemNoise(self.run.config.seed, range(number, number + len(items)), "validation")
                number += len(items)
                yield held_out.read(items).to(self.run.device), random

    def _starts(self, batch: Batch, random: ItemNoise) -> Iterator[tuple[Tensor, Tensor]]:
        """Levels [B] and where the student starts there [B, C, H, W]."""
        process, latents = self.run.method.student.process, batch.latents
        noise = random.normal_like(latents)
        for level in self.run.method.levels_of(batch):
            sigma = latents.new_full((len(latents),), level)
            stored = [i for i, s in enumerate(batch.state_sigmas) if same_level(s, level)]
            if batch.states is not None and stored:
                yield sigma, batch.states[:, stored[0]]
            elif level < process.sigma_max * (1 - 1e-4):
                yield sigma, process.noise_scaling(sigma, noise, latents)
