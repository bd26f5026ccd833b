"""Core's TrainLoraNode at several settings beside our trainer, at full size on a CPU: memory and time of a step.

Runs in ComfyUI's Python on Linux, with a file of tests/full_size/write_models.py:
    python tests/benchmarks/beside_core.py FILE NETWORK FOLDER [KIND ...]

16 x 16 latents, batch 2, rank 16, two steps, bfloat16 (MODEL, core's training_dtype, our autocast and LoRA), each KIND
in a process of its own. Memory is anonymous, over what the process held before MODEL was loaded: MODEL and the
trainer's copy of it are in it. The time is that of the last step, of all threads. Core trains every layer with a
weight, and the biases; ours trains the linear layers of the blocks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "host"), str(TESTS / "full_size")]
from core_trainer import core_settings  # noqa: E402
from real_run import GIB, Watch, anonymous, begin_again, load, run_on, shapes_of, step  # noqa: E402

SIDE, BATCH, RANK, STEPS = 16, 2, 16, 2
HIGHEST = (14.6146,)  # noise level of a turbo of one step
CORE = {  # what differs from the node's own defaults
    "core, defaults": {},
    "core, depth 3": {"checkpoint_depth": 3},
    "core, bypass, depth 2": {"bypass_mode": True, "checkpoint_depth": 2},
    "core, bypass, depth 3": {"bypass_mode": True, "checkpoint_depth": 3},
    "core, bypass, depth 4": {"bypass_mode": True, "checkpoint_depth": 4},
    "core, bypass, depth 3, offloading, quantized_backward": {
        "bypass_mode": True,
        "checkpoint_depth": 3,
        "offloading": True,
        "quantized_backward": True,
    },
}
DENOISING = {"denoising": 1.0}
OURS = {  # method, its terms, where the blocks lie
    "ours, denoising": ("ladd", DENOISING, "none"),
    'ours, denoising, offload "file"': ("ladd", DENOISING, "file"),
    "ours, Tune Turbo": ("tune", None, "none"),
    "ours, LADD": ("ladd", None, "none"),
    'ours, LADD, offload "file"': ("ladd", None, "file"),
}


def core_steps(model, settings: dict, name: str, begin: Callable[[], None]) -> list[float]:
    """CPU seconds between the node's steps."""
    import comfy_extras.nodes_train as core
    import torch

    shapes, times = shapes_of(name, SIDE), []
    pass_once = core.TrainSampler.fwd_bwd

    def timed(*args, **kwargs):
        if not times:
            begin()
        times.append(time.process_time())
        return pass_once(*args, **kwargs)

    core.TrainSampler.fwd_bwd = timed
    given = core_settings(BATCH, STEPS, RANK, **settings)
    extra = {"pooled_output": shapes.cond.pooled} if shapes.cond.pooled is not None else {}
    positive = [[shapes.cond.context, extra] for _ in range(BATCH)]
    latents = torch.randn(BATCH, *shapes.latent)
    core.TrainLoraNode.execute(model=[model], latents=[{"samples": latents}], positive=[positive], **given)
    times.append(time.process_time())
    return [b - a for a, b in zip(times, times[1:], strict=False)]


def our_steps(model, kind: tuple, name: str, folder: str, begin: Callable[[], None]) -> list[float]:
    """CPU seconds of our steps."""
    from pack.distill_core.methods.ladd import LADDConfig
    from pack.distill_core.methods.tune import TuneConfig
    from pack.distill_core.models.lora import LoraConfig
    from pack.distill_core.training.loop_config import TrainConfig
    from pack.distill_core.training.run import StudentConfig

    which, terms, offload = kind
    config = {"ladd": LADDConfig, "tune": TuneConfig}[which]
    method = config(**({"terms": terms} if terms else {}), warmup_steps=0)
    train = TrainConfig(batch_size=BATCH, precision="bfloat16", offload=offload)
    student, times = StudentConfig(RANK, lora=LoraConfig(lora_dtype="bfloat16")), []
    levels = HIGHEST if which == "tune" else ()  # a batch of what is kept is its larger one
    with run_on(model, name, SIDE, method, train, student, True, folder, levels) as run:
        begin()
        for number in range(STEPS):
            started = time.process_time()
            step(run, number)
            times.append(time.process_time() - started)
    return times


def measure(file: str, name: str, folder: str, kind: str) -> dict:
    from launch import enter_host

    enter_host()
    import torch

    torch.randn(512, 512).requires_grad_().mm(torch.randn(512, 512)).sum().backward()  # threads and libraries
    before, watch = anonymous(), Watch()
    model, peaks = load(file), []

    def begin() -> None:
        peaks.append(watch.peak)
        watch.again()

    with torch.inference_mode():  # as nodes run
        if kind in CORE:
            steps = core_steps(model, CORE[kind], name, begin)
        else:
            steps = our_steps(model, OURS[kind], name, folder, begin)
    return {"until": peaks[0] - before, "peak": watch.peak - before, "seconds": steps[-1]}


def main(file: str, name: str, folder: str, *kinds: str) -> None:
    print("| trainer | until the first step, GiB | in the steps, GiB | CPU seconds a step |")
    print("|---|---|---|---|", flush=True)
    for kind in kinds or (*CORE, *OURS):
        command = [sys.executable, __file__, "--one", file, name, folder, kind]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            print(f"| {kind} | failed: {done.stderr.strip().splitlines()[-1][:200]} | | |", flush=True)
            continue
        found = json.loads(line.removeprefix("RESULT "))
        until, peak = found["until"] / GIB, found["peak"] / GIB
        print(f"| {kind} | {until:.2f} | {peak:.2f} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        begin_again()
        print("RESULT", json.dumps(measure(*sys.argv[2:])))
    else:
        main(*sys.argv[1:])
