"""What a process takes while it works: the most anonymous memory, and CPU seconds up to each step of a run."""

from __future__ import annotations

import os
import threading
from pathlib import Path

EVERY = 0.1  # seconds between looks
TICKS = os.sysconf("SC_CLK_TCK")


class Watch(threading.Thread):
    """Looks at a process of Linux until `stop`. log: a run's log, which has one line more after each of its steps.

    peaks: most bytes of anonymous memory seen while so many steps were done (RssAnon: not what is mapped from files).
    at_step: CPU seconds of the process when a step had just been seen to be done.
    """

    def __init__(self, pid: int, log: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.log = Path(f"/proc/{pid}"), log
        self.peaks: dict[int, int] = {}
        self.at_step: dict[int, float] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(EVERY):
            try:
                self.look()
            except (OSError, StopIteration):  # it has ended
                return

    def look(self) -> None:
        lines = (self.process / "status").read_text().splitlines()
        anonymous = next(line for line in lines if line.startswith("RssAnon:"))
        steps = len(self.log.read_text("utf-8", "replace").splitlines()) if self.log.exists() else 0
        self.peaks[steps] = max(self.peaks.get(steps, 0), 1024 * int(anonymous.split()[1]))
        self.at_step.setdefault(steps, self.cpu_seconds())

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    def cpu_seconds(self) -> float:
        """Of all its threads since it began."""
        fields = (self.process / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def stop(self) -> None:
        self.stopped.set()
        self.join()
