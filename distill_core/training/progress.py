"""What a run tells and leaves while it trains: a line for the console, and a student to compare now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from .loop import Event
from .monitor import Condition

# Beside the terms of the student's loss.
SHOWN = (
    *("discriminator", "fake_score", "accuracy", "logit_gap", "implicit_accuracy"),
    *("validation", "validation_accuracy", "retention"),
)


class StatusLine:
    """A line every ``every`` steps (0: never): step, losses, seconds a step, time left, the status word.

    terms: of the student's loss, shown first.  write: takes the line.
    """

    def __init__(self, every: int, terms: tuple[str, ...], write: Callable[[str], None]) -> None:
        self.every, self.shown, self.write = every, (*terms, *SHOWN), write
        self.latest: dict[str, float] = {}  # values of the last step that had them: few steps have a validation
        self.since: tuple[float, int] | None = None  # when which step had been done

    def __call__(self, event: Event, condition: Condition) -> None:
        now = time.monotonic()
        self.latest |= event.logs
        if self.since is None:  # the first step has no beginning here
            self.since = now, event.step
        if not self.every or (event.step % self.every and event.step != event.steps):
            return
        then, before = self.since
        seconds = (now - then) / (event.step - before) if event.step > before else None
        figures = [f"{name} {self.latest[name]:.3f}" for name in self.shown if name in self.latest]
        pace = (
            [] if seconds is None else [f"{seconds:.2g} s/step", f"{_clock(seconds * (event.steps - event.step))} left"]
        )
        self.write(", ".join([f"step {event.step} of {event.steps}", *figures, *pace, condition.word]))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Pace:
    """Says how far a count is, at most every ``every`` seconds and at its end: done of all, seconds each, time left.

    what: is counted.  write: takes the line.
    """

    def __init__(self, what: str, every: float, write: Callable[[str], object]) -> None:
        self.what, self.every, self.write = what, every, write
        self.there(0)

    def there(self, done: int) -> None:
        """So many are there that took no time: time is counted from here."""
        self.first, self.begun = done, time.monotonic()
        self.said = self.begun

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said >= self.every or done == total:
            seconds, self.said = (now - self.begun) / max(1, done - self.first), now
            self.write(f"{self.what}: {done} of {total}, {seconds:.2g} s each, {_clock(seconds * (total - done))} left")


class Snapshots:
    """The averaged student as a file of its own every ``every`` steps (0: never), beside the run's own.

    student: the run's file.  save: writes the student to a path, atomically. The last step's is the run's own file.
    """

    def __init__(self, every: int, student: Path, save: Callable[[Path], None]) -> None:
        self.every, self.student, self.save = every, student, save

    def path(self, step: int) -> Path:
        """snapshots/NAME_step000500.safetensors, in the folder of NAME.safetensors."""
        return self.student.parent / "snapshots" / f"{self.student.stem}_step{step:06}.safetensors"

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.every and event.step % self.every == 0 and event.step < event.steps:
            self.save(self.path(event.step))
