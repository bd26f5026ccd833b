"""How a run is doing while it trains, in a plain word, and an end to it when it is lost.

The accuracy of the discriminator alone says little: it stays at 50 % in runs that improve. The words rest on how far
apart the heads' verdicts on real and on fake items are in units of their spread among items, the *separation*
(d', signal detection theory), and on how much the student's outputs differ from each other, compared with the real
ones. docs/health.md has the runs of known outcome that the limits were set on.

A separation that is far out is advice, no end: a discriminator knows a few pictures by heart while the student still
learns from it. A run is lost when its student's outputs are alike or wild as well, or when they or its gradient have
exploded: norms inside a network can keep outputs in shape long after its weights have left all bounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .loop import Event, Run, copy_into

BLIND_BELOW, OVERPOWERING_ABOVE, NO_DIFFERENCE = -0.5, 2.0, 0.03  # separation, and |separation|
FAR_SEPARATION, LOST_DIVERSITY = (-2.0, 3.0), (0.25, 4.0)  # docs/health.md
WILD_SPREAD = 4.0  # of outputs among items; latents have about 1
EXPLODED = {"size": 100.0, "generator_grad_norm": 1e8}  # of outputs, about 1, and of the student's gradient, about 1
ADVICE = {
    "starting": "too few steps to tell",
    "healthy": "the discriminator sees a difference and the student follows",
    "blind": "the discriminator does not see what is fake: raise discriminator_lr, or lower student_lr or the re-noise "
    "mean",
    "overpowering": "the discriminator tells every image, which is usual with few pictures: if the samples get worse, "
    "lower discriminator_lr or student_lr, or raise r1 or the re-noise mean",
    "collapsed": "the student is lost: its images are all alike or wild, or its weights have exploded",
    "no discriminator": "only distances are trained",
    "unknown": "no batch has two different items, so there is no spread to judge by",
}


@dataclass(frozen=True)
class Condition:
    """One word and the means over the last steps it rests on.

    separation: (mean real - mean fake logit) / spread among items, 0 when it cannot be told.
    diversity: spread of the student's outputs among items / that of the real latents, 1 when it cannot be told.
    """

    word: str
    separation: float = 0.0
    accuracy: float = 0.0
    logit_gap: float = 0.0
    diversity: float = 1.0

    @property
    def advice(self) -> str:
        return ADVICE[self.word]


class Collapse(FloatingPointError):
    """Training was ended because the student was lost; the run holds its last good weights."""


class Health:
    """Condition of a run from the logs of its steps.

    window: steps that are averaged.  patience: steps in a row a student may look lost before it counts as collapsed.
    """

    def __init__(self, window: int = 20, patience: int = 100) -> None:
        if window < 1 or patience < 1:
            raise ValueError("window and patience must be at least 1")
        self.window, self.patience, self.lost_for = window, patience, 0
        self.steps: deque[Mapping[str, float]] = deque(maxlen=window)
        self.first_spread: float | None = None  # of the student's outputs in the first window

    def replay(self, logs: Iterable[Mapping[str, float]]) -> Condition | None:
        """Take in the logs of a run so far; the condition after the last, None where there are none."""
        condition = None
        for entry in logs:
            condition = self.update(entry)
        return condition

    def update(self, logs: Mapping[str, float]) -> Condition:
        """Take in one step's logs (`loop.Event.logs`)."""
        self.steps.append(logs)
        full = len(self.steps) == self.window
        gap, logit_spread = self._mean("logit_gap"), self._size("logit_spread")
        separation = _ratio(gap, logit_spread)
        diversity, spread = self._mean("diversity"), self._mean("spread")
        if full and self.first_spread is None:
            self.first_spread = spread
        exploded = not all(self._mean(name, 0.0) < limit for name, limit in EXPLODED.items())
        lost = full and (exploded or self._lost(separation, diversity, spread))
        self.lost_for = self.lost_for + 1 if lost else 0
        word = self._word(separation, _ratio(self._size("logit_gap"), logit_spread))
        return Condition(
            word, separation or 0.0, self._mean("accuracy") or 0.0, gap or 0.0, 1.0 if diversity is None else diversity
        )

    def _lost(self, separation: float | None, diversity: float | None, spread: float | None) -> bool:
        """Whether the outputs are alike or wild, and the discriminator, if there is one, is sure of its verdicts.

        A few pictures may be almost alike, and the untrained student's answer to pure noise is a blur that hardly
        varies. So outputs are wild only beyond what latents have, and alike only below what they had at first.
        """
        if diversity is None:
            return False
        low, high = LOST_DIVERSITY
        spread = diversity if spread is None else spread  # logs of 0.2 do not have it
        alike = diversity < low and spread <= low * (self.first_spread or math.inf)
        wild = diversity > high and spread > WILD_SPREAD
        sure = separation is None or not FAR_SEPARATION[0] <= separation <= FAR_SEPARATION[1]
        return (alike or wild) and sure

    def _word(self, separation: float | None, difference: float | None) -> str:
        if len(self.steps) < self.window:
            return "starting"
        if self.lost_for >= self.patience:
            return "collapsed"
        if not any("logit_gap" in step for step in self.steps):
            return "no discriminator"
        if separation is None or difference is None:
            return "unknown"
        if difference < NO_DIFFERENCE or separation < BLIND_BELOW:
            return "blind"
        return "overpowering" if separation > OVERPOWERING_ABOVE else "healthy"

    def _values(self, name: str) -> list[float]:
        """What the steps of the window have of it: not every batch has two items to compare."""
        return [step[name] for step in self.steps if name in step]

    def _mean(self, name: str, missing: Any = None) -> Any:
        values = self._values(name)
        return sum(values) / len(values) if values else missing

    def _size(self, name: str) -> float | None:
        """Root mean square."""
        values = self._values(name)
        return (sum(value**2 for value in values) / len(values)) ** 0.5 if values else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    if value is None or unit is None:
        return None
    return value / unit if unit else math.copysign(math.inf, value) if value else 0.0


class Monitor:
    """A listener of `train` that knows the condition after each step, and ends a run whose student is lost.

        run.resume()
        with Monitor(run) as monitor:
            for event in train(run, [monitor]):
                print(event.step, monitor.condition.word)

    Then, and when a value that is not finite ends a run that looked lost, or has left a step half done, the run
    goes back to its last good step: weights, average and step counter are those before the student began to look lost,
    and the checkpoint says so. They are copied to the CPU once a window. ``train.stop_when_lost`` says whether a lost
    student ends a run. Raises `Collapse`.
    """

    def __init__(self, run: Run, health: Health | None = None) -> None:
        self.run, self.health = run, health or Health()
        self.good = Snapshot(run)
        self.condition = Condition("starting")

    def __call__(self, event: Event) -> None:
        self.condition = self.health.update(event.logs)
        if self.condition.word == "collapsed" and self.run.config.stop_when_lost:
            raise self._back_to_good(
                f"{self.condition.advice} (diversity {self.condition.diversity:.3g} of the real ones', separation "
                f"{self.condition.separation:.3g}, {self.health.lost_for} steps in a row)"
            )
        if self.health.lost_for == 0 and event.step >= self.good.step + self.health.window:
            self.good.take()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, FloatingPointError) or isinstance(error, Collapse):
            return
        if self.health.lost_for or not (self.run.between_steps and _finite(self.run)):
            collapse = self._back_to_good(str(error))
            self.run.save()
            raise collapse from error

    def _back_to_good(self, reason: str) -> Collapse:
        """Put the good weights back; what to tell about it."""
        stopped, config = self.run.step, self.run.config
        self.good.restore()
        kept = f"The weights of step {self.run.step} are kept" if self.run.step else "No step before it can be kept"
        return Collapse(
            f"training ended after step {stopped}: {reason}. {kept}. Start another run with a student_lr below "
            f"{config.student_lr:g}, or with the pairs term. To go on in spite of it, switch stop_when_lost off "
            "([train], or the node Training Settings)"
        )


class Snapshot:
    """A copy of everything a run trains, on the CPU, with the step it was taken at; there is never a second one."""

    def __init__(self, run: Run) -> None:
        self.run, self.step = run, run.step
        self.copies = [{name: v.detach().cpu().clone() for name, v in tensors.items()} for tensors in _trained(run)]

    def take(self) -> None:
        """Take the run's present weights in place of the former, unless some are not finite."""
        if _finite(self.run):
            self.step = self.run.step
            for copies, tensors in zip(self.copies, _trained(self.run), strict=True):
                copy_into(copies, tensors)

    def restore(self) -> None:
        """The weights and the step as they were; the optimisers forget the steps that spoiled them."""
        for tensors, copies in zip(_trained(self.run), self.copies, strict=True):
            copy_into(tensors, copies)
        for optimizer in self.run.optimizers.values():
            optimizer.state.clear()
        self.run.step, self.run.between_steps = self.step, True


def _trained(run: Run) -> list[Mapping[str, Tensor]]:
    """Everything a step changes: the players' weights and what they keep beside them, and the student's average."""
    return [*(player.parameters for player in run.players), *(player.buffers for player in run.players), run.ema]


def _finite(run: Run) -> bool:
    mine = all(value.isfinite().all() for tensors in _trained(run) for value in tensors.values())
    return run.parts.all_agree(mine) if run.parts else mine
