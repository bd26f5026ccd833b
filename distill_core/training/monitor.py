"""How a run is doing while it trains, in a plain word, and an end to it when it is lost.

The accuracy of the discriminator alone says little: it stays at 50 % in runs that improve. The words rest on how far
apart the heads' verdicts on real and on fake items are in units of their spread among items, the *separation*
(d', signal detection theory), and on how much the student's outputs differ from each other, compared with the real
ones. docs/health.md has the runs of known outcome that the limits were set on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .loop import Event, Run, copy_into

BLIND_BELOW, OVERPOWERING_ABOVE, NO_DIFFERENCE = -0.5, 2.0, 0.03  # separation, and |separation|
LOST_SEPARATION, LOST_DIVERSITY = (-2.0, 3.0), (0.25, 4.0)  # docs/health.md: no run that stayed outside recovered
ADVICE = {
    "starting": "too few steps to tell",
    "healthy": "the discriminator sees a difference and the student follows",
    "blind": "the discriminator does not see what is fake: raise its learning rate, or lower the student's or the "
    "re-noise mean",
    "overpowering": "the discriminator tells every image: lower its learning rate or its updates, or raise the "
    "re-noise mean; if the student's rate is high, lower it",
    "collapsed": "the student is lost: its images are all alike or wild, or the discriminator could not be more wrong "
    "or more right about them",
    "no discriminator": "only distances are trained",
    "unknown": "a batch of one item has no spread to judge by",
}


@dataclass(frozen=True)
class Condition:
    """One word and the means over the last steps it rests on.

    separation: (mean real - mean fake logit) / spread among items, 0 when it cannot be told apart.
    diversity: spread of the student's outputs among items / that of the real latents.
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
    """Training was ended because the student had collapsed; the run holds its last good weights."""


class Health:
    """Condition of a run from the logs of its steps.

    window: steps that are averaged.  patience: steps in a row a student may look lost before it counts as collapsed.
    """

    def __init__(self, window: int = 20, patience: int = 100) -> None:
        if window < 1 or patience < 1:
            raise ValueError("window and patience must be at least 1")
        self.window, self.patience, self.lost_for = window, patience, 0
        self.steps: deque[dict[str, float]] = deque(maxlen=window)

    def update(self, logs: dict[str, float]) -> Condition:
        """Take in one step's logs (`train.Event.logs`)."""
        self.steps.append(logs)
        spread = self._root_mean_square("logit_spread")
        separation = self._mean("logit_gap") / spread if spread else 0.0
        diversity = self._mean("diversity", 1.0)
        lost = not _inside(diversity, LOST_DIVERSITY) or not _inside(separation, LOST_SEPARATION)
        full = len(self.steps) == self.window
        self.lost_for = self.lost_for + 1 if lost and full else 0
        word = self._word(separation, self._root_mean_square("logit_gap") / spread if spread else None)
        return Condition(word, separation, self._mean("accuracy"), self._mean("logit_gap"), diversity)

    def _word(self, separation: float, difference: float | None) -> str:
        if len(self.steps) < self.window:
            return "starting"
        if self.lost_for >= self.patience:
            return "collapsed"
        if "logit_gap" not in self.steps[-1]:
            return "no discriminator"
        if difference is None:
            return "unknown"
        if difference < NO_DIFFERENCE or separation < BLIND_BELOW:
            return "blind"
        return "overpowering" if separation > OVERPOWERING_ABOVE else "healthy"

    def _mean(self, name: str, missing: float = 0.0) -> float:
        return sum(step.get(name, missing) for step in self.steps) / len(self.steps)

    def _root_mean_square(self, name: str) -> float:
        return (sum(step.get(name, 0.0) ** 2 for step in self.steps) / len(self.steps)) ** 0.5


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


class Monitor:
    """A listener of `train` that knows the condition after each step, and ends a run whose student has collapsed.

        with Monitor(run) as monitor:
            for event in train(run, [monitor]):
                print(event.step, monitor.condition.word)

    After a collapse, and when weights are no longer finite, the run holds the last good weights: those before the
    student began to look lost. They are copied to the CPU once a window. Several processes see different parts of a
    batch and would not stop together, so there it only says it. Raises `Collapse`.
    """

    def __init__(self, run: Run, health: Health | None = None) -> None:
        self.run, self.health = run, health or Health()
        self.good = Snapshot(run)
        self.condition = Condition("starting")

    def __call__(self, event: Event) -> None:
        self.condition = self.health.update(event.logs)
        alone = self.run.accelerator is None or self.run.accelerator.num_processes == 1
        if self.condition.word == "collapsed" and alone:
            self.good.restore()
            raise Collapse(
                f"stopped at step {event.step}: {self.condition.advice} (diversity {self.condition.diversity:.2f}, "
                f"separation {self.condition.separation:.1f}). The weights of step {self.good.step} are kept. Lower "
                "the student's learning rate, or add the pairs term"
            )
        if self.health.lost_for == 0 and event.step >= self.good.step + self.health.window:
            self.good = Snapshot(self.run)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        parameters = [value for player in self.run.players for value in player.parameters.values()]
        if kind and issubclass(kind, FloatingPointError) and not all(value.isfinite().all() for value in parameters):
            self.good.restore()


class Snapshot:
    """A copy of everything a run trains, on the CPU, at its present step."""

    def __init__(self, run: Run) -> None:
        self.run, self.step = run, run.step
        self.players = {player.name: _copy(player.parameters) for player in run.players}
        self.ema = _copy(run.ema)

    def restore(self) -> None:
        """The weights as they were; the optimisers forget the steps that spoiled them."""
        for player in self.run.players:
            copy_into(player.parameters, self.players[player.name])
            self.run.optimizers[player.name].state.clear()
        copy_into(self.run.ema, self.ema)


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}
