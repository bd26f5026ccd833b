"""Which of our files a training step passes through, from the button to the optimizer.

    python tests/files_of_a_step.py

Traces one step of a run. A file is *open* when a function of it is on the stack while a network computes (any
``torch.nn.Module``), a gradient is taken or an optimizer steps: what a reader has to follow to get from the button to
the arithmetic. Beside it, for comparison: files of which any function ran during the step itself, and from the button
to the end of the step (leaf helpers, checks before the run and files that are written among them).
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

REPO = Path(__file__).resolve().parents[1]
OURS = (f"{REPO}/distill_core/", f"{REPO}/nodes/")
ARITHMETIC = {
    ("torch/nn/modules/module.py", "_call_impl"),
    ("torch/autograd/__init__.py", "backward"),
    ("torch/autograd/__init__.py", "grad"),
    ("torch/optim/adamw.py", "step"),
    ("torch/optim/adam.py", "step"),
}
CONFIG = """
[train]
steps = 1
batch_size = 4
[ladd]
terms = { adversarial = 1.0, pairs = 1.0 }
"""
CACHE = "[cache]\ncount = 8\nsteps = 4\nguidance = 1.5\nsizes = [[8, 8]]\nstate_sigmas = [1.0, 0.75, 0.5, 0.25]\n"


class Trace:
    """The files found, as paths from the repository's root."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.step: set[str] = set()
        self.all: set[str] = set()
        self.in_step = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        name = code.co_filename
        if event == "return" and code.co_name == "training_step" and name.startswith(OURS):
            self.in_step = False
        if event != "call":
            return
        if name.startswith(OURS):
            if code.co_name == "<module>":
                return
            self.in_step |= code.co_name == "training_step"
            self.all.add(name)
            if self.in_step:
                self.step.add(name)
        elif self.in_step and any(name.endswith(f) and code.co_name == fn for f, fn in ARITHMETIC):
            self.open |= set(stack_of_ours(frame))

    def files(self, which: str) -> list[str]:
        return sorted(str(Path(file).relative_to(REPO)) for file in getattr(self, which))


def stack_of_ours(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            yield frame.f_code.co_filename
        frame = frame.f_back


@contextmanager
def traced() -> Iterator[Trace]:
    """Trace what runs inside, in this thread and in those that start meanwhile."""
    trace = Trace()
    sys.setprofile(trace), threading.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None), threading.setprofile(None)


def headless(main: Callable[[list[str]], int], folder: Path) -> Trace:
    """The command ``train`` on the mini model, for one step."""
    config = folder / "c.toml"
    config.write_text(CONFIG + CACHE)
    assert main(["cache", str(config), "--out", str(folder / "data")]) == 0
    with traced() as trace:
        assert main(["train", str(config), "--data", str(folder / "data"), "--out", str(folder / "run")]) == 0
    return trace


def report(trace: Trace) -> str:
    lines = [f"{len(trace.files('open'))} files open from the button to the optimizer:"]
    lines += [f"  {file}" for file in trace.files("open")]
    lines.append(f"{len(trace.files('step'))} of which any function runs in the step, {len(trace.files('all'))} in all")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    from distill_core.cli.main import main

    with tempfile.TemporaryDirectory() as temporary:
        print(report(headless(main, Path(temporary))))
