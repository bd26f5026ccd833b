"""What a training run in the server leaves on disk, and how it is stopped; for the tests of all trainers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from server import Host, failure_text

from distill_core.lora_files import read_lora
from distill_core.training.run_folder import RunFolder


def run_folder(host: Host, name: str) -> Path:
    return host.base_dir / "output" / "turbo_distill" / "runs" / name


def lora_of(host: Host, name: str) -> Path:
    return host.base_dir / "output" / "loras" / "turbo_distill" / f"{name}.safetensors"


def log_of(host: Host, name: str) -> list[dict]:
    return RunFolder(run_folder(host, name)).logs()


def steps_of(host: Host, name: str) -> list[int]:
    """The steps in the run's log, which must be 1, 2, 3, ..."""
    return [entry["step"] for entry in log_of(host, name)]


def wait_for_step(host: Host, name: str, step: int, timeout: float = 300.0) -> None:
    end = time.monotonic() + timeout
    while len(steps_of(host, name)) < step:
        host.check_alive()
        assert time.monotonic() < end, f"no step {step} in {timeout} s\n{host.log()[-3000:]}"
        time.sleep(0.01)


def fails(host: Host, graph: dict) -> str:
    """The error that a workflow ends with; the server must be alive after it."""
    entry = host.wait(host.queue(graph), 300)
    assert entry["status"]["status_str"] == "error", entry["status"]
    host.get("/system_stats")
    return failure_text(entry)


def assert_same_files(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def check_cancelled_run(host: Host, graph: Callable[..., dict]) -> None:
    """A run that is cancelled somewhere has saved what it did, and goes on to the same files as an undisturbed one.

    graph: by a run's name, steps and seed; its trainer is the node "train".
    """
    host.run(graph("whole", steps=20, seed=1), 300)
    prompt = host.queue(graph("cut", steps=20, seed=1))
    wait_for_step(host, "cut", random.randint(2, 12))
    host.post("/interrupt")
    assert "interrupted in node train" in failure_text(host.wait(prompt, 120))
    stopped = len(steps_of(host, "cut"))
    assert 2 <= stopped < 20 and read_lora(lora_of(host, "cut"))[1]["steps"] == stopped
    host.run(graph("cut", steps=20, seed=1), 300)
    assert steps_of(host, "cut") == list(range(1, 21))
    assert_same_files(lora_of(host, "cut"), lora_of(host, "whole"))
    assert_same_files(*(run_folder(host, name) / "checkpoint.safetensors" for name in ("cut", "whole")))
