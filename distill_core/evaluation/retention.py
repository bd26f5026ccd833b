"""What a turbo model has lost through tuning, measured against nothing but what it was before.

Both models answer the same prompts from the same noises, at the turbo's own levels and with its own sampler. No
reference pictures and no other network take part. docs/retention.md has how the score follows the true distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..diffusion.process import DiscreteProcess, NoiseProcess
from ..diffusion.samplers import Model, sample
from ..diffusion.schedules import levels_at
from ..models.denoiser import Cond
from .detail import FINE, cross_energies
from .intervals import REPEATS, Bootstrap, Figure
from .samples import EVALUATION

FINER = 4  # as many steps are the many-step answer's
Figures = dict[str, Figure]


@dataclass(frozen=True)
class Asked:
    """What both models are asked.

    conds: of the kept prompts, one row each.  sigmas [steps + 1]: the turbo's own.  shape: of a latent [C, H, W].
    noises: of each prompt, at least 2.  sampler, options: the turbo's own.  seed: of the noises, whose stream no
    training draws from (`samples.EVALUATION`).
    """

    conds: Sequence[Cond]
    sigmas: Tensor
    shape: Sequence[int]
    noises: int = 8
    sampler: str = "renoise"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def count(self) -> int:
        return len(self.conds) * self.noises

    @property
    def forwards(self) -> int:
        """Of `sample_answers`; `sample_step_gaps` has 1 + `FINER` times as many."""
        return self.count * (len(self.sigmas) - 1)


Done = Callable[[int], object]  # hears how many forwards have just been done, an item's each


def sample_answers(model: Model, asked: Asked, done: Done = lambda items: None) -> Tensor:
    """A model's answers [N, C, H, W] on the CPU as the turbo is sampled: item i to prompt i mod P."""
    return _sampled(model, asked, asked.sigmas, done, sampler=asked.sampler, **asked.options)


def sample_step_gaps(model: Model, asked: Asked, done: Done = lambda items: None) -> Tensor:
    """`gaps` between each item's answer in the turbo's steps and in `FINER` times as many, without added noise."""
    grids = asked.sigmas, finer_levels(asked.sigmas, model.process)
    return gaps(*(_sampled(model, asked, sigmas, done, sampler="euler") for sigmas in grids))


def _sampled(model: Model, asked: Asked, sigmas: Tensor, done: Done, **sampler: Any) -> Tensor:
    parts = []
    for number, cond in enumerate(asked.conds):
        items = range(number, asked.count, len(asked.conds))
        walk = {"seed": asked.seed, "items": items, "purpose": EVALUATION, **sampler}
        x = sample(model, model.process, sigmas, cond[[0] * asked.noises], asked.shape, **walk)
        parts.append(x.float().cpu())
        done(len(items) * (len(sigmas) - 1))
    return torch.stack(parts, 1).flatten(0, 1)


def finer_levels(sigmas: Tensor, process: NoiseProcess) -> Tensor:
    """`FINER` steps for each of a grid, through the same levels: [FINER (N - 1) + 1]."""
    table = process.sigmas if isinstance(process, DiscreteProcess) else None
    intervals = (len(sigmas) - 1) * FINER
    return torch.cat([levels_at(sigmas, [i / FINER for i in range(intervals, 0, -1)], table), sigmas[-1:]])


def gaps(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of each item of a [N, C, H, W] to its like in b: [N], float64."""
    return (a.double() - b.double()).flatten(1).square().sum(1)


def fine_energy(latents: Tensor) -> Tensor:
    """Energy of latents [N, C, H, W] above half of the Nyquist frequency (`detail`), the channels' mean: [N]."""
    planes = latents.flatten(0, 1)
    return cross_energies(planes, planes)[:, FINE].sum(1).view(len(latents), -1).mean(1)


def retention(
    before: Tensor, after: Tensor, prompts: int, step_gaps: tuple[Tensor, Tensor] | None = None, repeats: int = REPEATS
) -> Figures:
    """The score under "retention", and what it is made of.

    before, after: answers [N, C, H, W], item i to prompt i mod prompts.  step_gaps: `sample_step_gaps` of both.
    sharpness: fine energy, after / before.  variety: root mean squared distance between noises of one prompt, after /
    before.  drift: from the answer before to the answer after, by noise, relative to that between noises before: 0
    for the same picture, 1 for another one of the prompt, more for what the prompt did not give before.
    few_to_many: distance from the few- to the many-step answer, after / before.
    repeats: resamples for the intervals, over the noises of each prompt; 0 for none.
    Raises ValueError for answers that cannot be compared.
    """
    check_answers(before, after, prompts)
    count = len(before)
    weights = torch.cat([torch.ones(1, count), Bootstrap(count, prompts, repeats).counts]).double()
    pairs = same_prompt(count, prompts)

    def mean(values: Tensor) -> Tensor:
        """Of one value an item [N], in each resample [R]."""
        return weights @ values.double() / count

    def between_noises(x: Tensor) -> Tensor:
        """Mean squared distance of the pairs, [R]."""
        x = x.flatten(1).double()
        distances = torch.cdist(x, x).square() * pairs
        found, count = (((weights @ m) * weights).sum(1) for m in (distances, pairs))
        return torch.where(count > 0, found / count, found[0] / count[0])  # of two noises a resample may have one twice

    spread = between_noises(before).clamp(min=1e-12)
    parts = {
        "sharpness": mean(fine_energy(after)) / mean(fine_energy(before)).clamp(min=1e-12),
        "variety": (between_noises(after) / spread).sqrt(),
        "drift": (mean(gaps(before, after)) / spread).sqrt(),
    }
    values = {"retention": score(**parts), **parts}
    if step_gaps is not None:
        values["few_to_many"] = (mean(step_gaps[1]) / mean(step_gaps[0]).clamp(min=1e-12)).sqrt()
    return {name: Figure(value[0].item(), value[1:].float()) for name, value in values.items()}


def score(sharpness: Tensor, variety: Tensor, drift: Tensor) -> Tensor:
    """Retention, from 0 to 1: 1 / (1 + drift^2 + (log sharpness / 4)^2 + (log variety / 2)^2).

    A drift of 1 halves it. More detail or variety than before is a loss as less is: noise is no detail. They weigh
    less, as the true distance asks for (docs/retention.md).
    """
    log = lambda ratio: ratio.clamp(min=1e-12).log()  # noqa: E731
    return 1 / (1 + drift.square() + (log(sharpness) / 4).square() + (log(variety) / 2).square())


def same_prompt(count: int, prompts: int) -> Tensor:
    """Which pairs of items have one prompt and two noises: [count, count] of 0 and 1."""
    of = torch.arange(count) % prompts
    return (of[:, None] == of[None]).double() - torch.eye(count, dtype=torch.float64)


def check_answers(before: Tensor, after: Tensor, prompts: int) -> None:
    """Raises ValueError where two models' answers cannot be compared."""
    if before.shape != after.shape or before.ndim != 4:
        raise ValueError(
            f"the answers before and after have the shapes {tuple(before.shape)} and {tuple(after.shape)}: ask both "
            "models the same prompts, at one size"
        )
    for when, x in (("before", before), ("after", after)):
        if not x.isfinite().all():
            raise ValueError(f"the model {when} tuning answers with values that are not finite: its weights are broken")
    if prompts < 1 or len(before) % prompts or len(before) < 2 * prompts:
        raise ValueError(
            f"{len(before)} answers to {prompts} prompts: each prompt needs the same number of noises, at least 2"
        )
