"""A real training run in this process, made the host's, at full size: what the memory benchmarks share.

Files of full size with random weights are made by tests/full_size/write_models.py.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Blocks of 64 KiB and more are mapped one by one and go back to the system at once, so that it counts what is alive.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MALLOC_MAPS = {"MALLOC_MMAP_MAX_": "10000000"}
EVERY = 0.002  # seconds between looks at the memory
GIB = 2**30


def begin_again() -> None:
    """Start this script anew with malloc's settings, which are read when a process starts."""
    wanted = AT_ONCE | MALLOC_MAPS
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def anonymous() -> int:
    """Bytes of this process that are mapped from no file (RssAnon)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch(threading.Thread):
    """Looks at this process's anonymous memory every 2 ms. peak: the most since `again`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = anonymous(), False
        self.start()

    def run(self) -> None:
        while not self.over:
            self.peak = max(self.peak, anonymous())
            time.sleep(EVERY)

    def again(self) -> None:
        self.peak = anonymous()


def load(path: str, dtype: str = "bfloat16"):
    """The MODEL as Load Diffusion Model gives it, its weights in ``dtype``; "default": as the host chooses on a CPU."""
    import comfy.sd
    import torch

    options = {} if dtype == "default" else {"dtype": getattr(torch, dtype)}
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(path, model_options=options)


@contextmanager
def run_on(model, name: str, side: int, method, train, student, checkpointing=True, folder=None, levels=()) -> Iterator:
    """The run, assembled on MODEL, with a dataset of noise: side x side latents, with states at ``levels``."""
    from pack.distill_core.methods.components import Components
    from pack.distill_core.training.run import RunConfig, assemble
    from pack.nodes.host.backend import training_backend

    config, shapes = RunConfig(method, train, student, {"base": "", "dataset": ""}), shapes_of(name, side, levels)
    with training_backend(model, checkpointing, train, folder) as backend:
        yield assemble(config, Components(backend), shapes)


def shapes_of(name: str, side: int, levels: tuple[float, ...] = ()):
    """What stands for a dataset of that network, of side x side latents with states at ``levels``."""
    import torch
    from full_shapes import SHAPES
    from pack.distill_core.models.denoiser import Cond
    from pack.distill_core.training.plan import Shapes

    latent, width, tokens, pooled = SHAPES[name]
    cond = Cond(torch.zeros(1, tokens, width), torch.zeros(1, pooled) if pooled else None)
    return Shapes((latent[0], side, side), cond, levels)


def step(run, number: int) -> None:
    """A training step of that number."""
    from pack.distill_core.training.loop import training_step

    run.step = number
    training_step(run)
