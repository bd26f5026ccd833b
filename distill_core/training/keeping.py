"""The stop rule "keep at least": a run ends when its student has lost too much of the turbo that it tunes.

It reads the figure ``retention`` in the logs, which a listener puts there (`evaluation.retention_watch`). The last
student that kept enough lies in the run's folder, so a run that is stopped, resumed or killed ends with the same one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..files import replacing
from ..lora_files import read_lora
from .loop import Event
from .monitor import Condition

FIGURE = "retention"  # of a step's logs
MUCH_LOST = 0.8  # below it, kept prompts were at 3.5 times their distance to real pictures and more (docs/retention.md)


class Keeping:
    """A watcher of a run, called after each step.

    at_least: the lowest retention that is still kept, 0 for no rule.  path: of the kept student's file.
    save: writes the student as it is now to a path, atomically.
    """

    def __init__(self, at_least: float, path: Path, save: Callable[[Path], None]) -> None:
        self.at_least, self.path, self.save = at_least, path, save
        self.kept = 0  # the last step whose student kept enough
        self.lost: tuple[int, float] | None = None  # the step that did not, and its figure
        self.last = 1.0  # the last figure

    def resume(self, logs: Iterable[Mapping[str, float]], step: int) -> None:
        """Take in the logs of the steps that a run has behind it when it goes on after ``step``."""
        for entry in logs:
            self._take(int(entry["step"]), entry)
        if self.at_least and self.lost is None and (step == 0 or self._step_of_file() != self.kept):
            self.kept = step  # not measured, and all that there is
            self.save(self.path)

    def __call__(self, event: Event, condition: Condition) -> None:
        if self._take(event.step, event.logs):
            self.save(self.path)

    def _take(self, step: int, logs: Mapping[str, float]) -> bool:
        """Whether a step's student is one to keep."""
        self.last = logs.get(FIGURE, self.last)
        if not self.at_least or self.lost or FIGURE not in logs:
            return False
        if logs[FIGURE] >= self.at_least:
            self.kept = step
            return True
        self.lost = step, logs[FIGURE]  # nan is lost, too
        return False

    def finish(self, student_file: Path) -> None:
        """Put the kept student in the place of the run's.

        Raises ValueError where the file is not the student that kept enough, as after the limit has been raised.
        """
        if self._step_of_file() != self.kept:
            raise ValueError(
                f"the student of step {self.kept}, the last with a retention of at least keep_at_least = "
                f"{self.at_least:g}, is no longer there: lower keep_at_least, or choose another run name or folder to "
                "start again"
            )
        with replacing(student_file) as temporary:
            shutil.copyfile(self.path, temporary)

    @property
    def said(self) -> str:
        """What is to be said at the end: that the rule ended the run, or that one without a rule has lost much."""
        if self.lost is not None:
            step, figure = self.lost
            return (
                f"ended after step {step}: retention {figure:.3f} is below keep_at_least = {self.at_least:g}. Saved is "
                f"the student of step {self.kept}, the last that kept it. To come further, lower student_lr, give the "
                "prompts to keep more weight, or lower keep_at_least: then the run goes on from where it ended"
            )
        if not self.at_least and self.last < MUCH_LOST:
            return (
                f"retention is {self.last:.3f} at the end, and 1 is nothing lost: other prompts have changed, too. "
                "Look at them before and after; keep_at_least ends a run in time"
            )
        return ""

    def _step_of_file(self) -> int | None:
        return int(read_lora(self.path)[1]["steps"]) if self.path.exists() else None
