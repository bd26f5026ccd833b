"""The planned peak of a training step beside the real one, at full size on a CPU: anonymous memory, LADD with a LoRA.

Runs in ComfyUI's Python on Linux, with a file of tests/full_size/write_models.py:
    python tests/benchmarks/plan_beside_peak.py FILE NETWORK [SIDE BATCH RANK CHECKPOINTING]

NETWORK: sd15 or sdxl.  SIDE: of the latents (default 32).  CHECKPOINTING: 1 or 0. The measured peak is that of the
second step, when Adam has its moments, over what the process held before the model was loaded; the run has MODEL's own
weights and no copy of them, since a plan counts them once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "host"), str(TESTS / "full_size")]
from real_run import GIB, Watch, anonymous, begin_again, load, run_on, shapes_of, step  # noqa: E402

begin_again()
FILE, NAME, *SIZES = sys.argv[1:]  # entering the host takes the arguments
from launch import enter_host  # noqa: E402

enter_host()

import torch  # noqa: E402
from pack.distill_core.methods.ladd import LADDConfig  # noqa: E402
from pack.distill_core.training.loop_config import TrainConfig  # noqa: E402
from pack.distill_core.training.run import RunConfig, StudentConfig  # noqa: E402
from pack.nodes.host import backend as host_backend  # noqa: E402
from pack.nodes.host.parts import Parts  # noqa: E402
from pack.nodes.host.plan import plan_of  # noqa: E402


def main(side: int = 32, batch: int = 2, rank: int = 64, checkpointing: int = 1) -> None:
    host_backend.own_copy = lambda model: model
    method, train, student = LADDConfig(warmup_steps=0), TrainConfig(batch_size=batch), StudentConfig(rank)
    torch.randn(512, 512).requires_grad_().mm(torch.randn(512, 512)).sum().backward()  # threads and libraries
    before, watch = anonymous(), Watch()
    model = load(FILE)
    weights = anonymous() - before
    config = RunConfig(method, train, student, {"base": "", "dataset": ""})
    parts = SimpleNamespace(
        model=model, train=train, student=student, parts=Parts(), checkpointing=bool(checkpointing), other_teacher=None
    )
    plan = plan_of(parts, config, shapes_of(NAME, side))
    print(plan.said(), flush=True)
    planning = anonymous() - before - weights  # what the planner has left of itself
    with run_on(model, NAME, side, method, train, student, bool(checkpointing)) as run:
        step(run, 0)
        watch.again()
        steady, started = anonymous() - before - planning, time.process_time()
        step(run, 1)
        spent, peak = time.process_time() - started, watch.peak - before - planning
    print(f"{NAME}, {side} x {side} latents, batch {batch}, rank {rank}, checkpointing {checkpointing}")
    print(f"weights {weights / GIB:.2f} GiB; the planner's own leavings {planning / GIB:.3f} GiB")
    print(f"between steps: planned {plan.steady / GIB:.3f} GiB, measured {steady / GIB:.3f}")
    print(f"peak: planned {plan.peak / GIB:.3f} GiB, measured {peak / GIB:.3f}: {plan.peak / peak - 1:+.1%}")
    print(f"without the weights: planned {(plan.peak - weights) / GIB:.3f}, measured {(peak - weights) / GIB:.3f}")
    print(f"the step took {spent:.0f} CPU-seconds")


if __name__ == "__main__":
    main(*map(int, SIZES))
