"""Retention while a run trains: the averaged student beside the turbo that it tunes, in the run's log."""

from __future__ import annotations

import hashlib
from itertools import chain

from torch import Tensor

from ..data.dataset import LatentDataset
from ..diffusion.schedules import explicit_sigmas
from ..models.denoiser import Cond, Denoiser, Guided
from ..training.keeping import FIGURE
from ..training.loop import Event, Listener, Run, autocast
from ..training.run import RunConfig
from .retention import Asked, retention, sample_answers

PROMPTS, NOISES = 4, 4  # asked each time
LOOKED_AT = 256  # items of a dataset, for its prompts


def retention_listeners(run: Run, config: RunConfig) -> list[Listener]:
    """What `training.run.train_to_end` takes to measure retention, where the settings want it; else nothing.

    Raises ValueError where keep_at_least cannot work.
    """
    train = config.train
    if train.keep_at_least and not train.retention_every:
        raise ValueError("keep_at_least needs retention to be measured: set retention_every above 0")
    if train.keep_at_least and config.student.lora.start_from:
        raise ValueError(
            "keep_at_least compares the student with the model as it is, and start_from puts another LoRA on it: load "
            "that LoRA into the model instead, or set keep_at_least to 0"
        )
    wanted = train.retention_every and (train.keep_at_least or config.method.tunes)
    return [RetentionWatch(run, config)] if wanted else []


class RetentionWatch:
    """A listener of `train` that adds ``retention`` to a step's logs: every N-th and the last step.

    The prompts are the first different ones of the dataset of kept prompts or, where there is none, of the dataset
    that is trained on; the noises are an evaluation's, always the same. The turbo before is the model with the student
    off. Everything depends on the weights alone, so a resumed run logs what an uninterrupted one would.
    """

    def __init__(self, run: Run, config: RunConfig) -> None:
        self.run, self.every = run, config.train.retention_every
        kept = [member for member in run.dataset.members if member.state_sigmas] or run.dataset.members
        conds = first_prompts(kept[0], PROMPTS)
        student = config.student
        self.asked = Asked(
            [cond.to(run.device) for cond in conds],
            explicit_sigmas(run.method.levels),
            kept[0].shapes[0],
            NOISES,
            student.sampler,
            student.sampler_options,
        )
        self.uncond, self.cfg = run.dataset.uncond().to(run.device), student.cfg
        self.before: Tensor | None = None

    def __call__(self, event: Event) -> None:
        if event.step % self.every == 0 or event.step == event.steps:
            event.logs[FIGURE] = self.figure()

    def figure(self) -> float:
        """Retention now."""
        run = self.run
        with autocast(run):
            if self.before is None:
                self.before = self._answers(Denoiser(run.method.student.base))
            with run.ema_weights():
                after = self._answers(run.method.student)
        figure = retention(self.before, after, len(self.asked.conds), repeats=0)["retention"].value
        if run.alone:
            return figure
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([figure])[0]  # all processes end at the same step

    def _answers(self, denoiser: Denoiser) -> Tensor:
        return sample_answers(Guided(denoiser, self.uncond, self.cfg), self.asked)


def first_prompts(dataset: LatentDataset, count: int) -> list[Cond]:
    """Up to ``count`` different conditionings of a dataset, one row each, in its order."""
    found: dict[bytes, Cond] = {}
    items = sorted(chain.from_iterable(dataset.buckets.values()))[:LOOKED_AT]
    for item in items:
        cond = dataset.read([item]).cond
        digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in cond.tensors().values())).digest()
        found.setdefault(digest, cond)
        if len(found) == count:
            break
    return list(found.values())
