"""Peak memory of one training step inside ComfyUI, core's TrainLoraNode beside ours, on a CPU.

    python tests/benchmarks/host_memory.py

An SD3-type model of 68 M weights, latents 16 x 32 x 32, 16 text tokens, batch 2, LoRA rank 8. Core runs at its defaults
(bfloat16, gradient checkpointing on, depth 1); ours is a full LADD step, student and discriminator, in float32, of a
LoRA or of all weights of a copy. Each
in a process of its own; the peak is the kernel's (VmHWM) from the loaded model on, over what was resident then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOST = HERE.parent / "host"
sys.path.append(str(HOST))
BLOCKS, WIDTH, BATCH, SIDE, TOKENS, RANK = 7, 512, 2, 32, 16, 8
KINDS = {
    "core": "core TrainLoraNode, defaults",
    "plain": "ours, no checkpointing",
    "checkpointed": "ours, checkpointing",
    "full": "ours, checkpointing, all weights",
}


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def load_model(disable_dynamic: bool = False):
    """The model with a loader that core can ask again."""
    import tiny_models

    model = tiny_models.deep_sd3(BLOCKS, WIDTH)
    model.cached_patcher_init = (load_model, ())
    return model


def core_step(model, latents, conditioning) -> None:
    from comfy_extras.nodes_train import TrainLoraNode
    from core_trainer import core_settings

    settings = core_settings(BATCH, steps=1, rank=RANK)
    TrainLoraNode.execute(model=[model], latents=[{"samples": latents}], positive=[conditioning], **settings)


def our_step(model, latents, conditioning, checkpointing: bool, full: bool) -> None:
    from pack.distill_core.data.dataset import Batch
    from pack.distill_core.discriminators.latent import LatentDiscriminator
    from pack.distill_core.methods.ladd import LADD
    from pack.distill_core.models.denoiser import Denoiser
    from pack.distill_core.training.loop import Run, TrainConfig, training_step
    from pack.nodes.host.backend import training_backend

    class OneBatch:
        def batch(self, *args) -> Batch:
            return content

    with training_backend(model, checkpointing) as backend:
        content = Batch(backend.latents_in(latents), backend.cond(conditioning))
        teacher = Denoiser(backend)
        student = Denoiser(backend.trainable_copy()) if full else Denoiser(backend, backend.new_lora(RANK))
        heads = LatentDiscriminator.for_teacher(teacher, backend.default_taps(), content)
        method = LADD(student, teacher, heads, taps=backend.default_taps())
        training_step(Run(method, OneBatch(), TrainConfig(batch_size=BATCH)))


def measure(kind: str) -> dict[str, float]:
    """One step in this process, in MiB."""
    from launch import enter_host

    enter_host()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with torch.inference_mode():  # as nodes run
        generator = torch.Generator().manual_seed(0)
        model = load_model()
        latents = torch.randn(BATCH, 16, SIDE, SIDE, generator=generator)
        context, pooled = torch.randn(BATCH, TOKENS, 256, generator=generator), torch.randn(BATCH, 64)
        conditioning = [[c[None], {"pooled_output": p[None]}] for c, p in zip(context, pooled, strict=True)]
        weights = sum(p.numel() for p in model.model.parameters())
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        if kind == "core":
            core_step(model, latents, conditioning)
        else:
            our_step(model, latents, conditioning, kind != "plain", kind == "full")
    peak = memory("VmHWM")
    return {"weights": weights * 4 / 2**20, "resident before": before, "peak": peak, "over it": peak - before}


def main() -> None:
    if len(sys.argv) > 1:
        found = measure(sys.argv[1])
        print("RESULT", json.dumps(found))
        return
    from server import PYTHON

    results = {}
    for kind in KINDS:
        at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
        done = subprocess.run([PYTHON, __file__, kind], env=at_once, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            sys.exit(done.stderr[-3000:])
        results[kind] = json.loads(line.removeprefix("RESULT "))
        print(f"{kind} done", file=sys.stderr, flush=True)
    print(f"{'MiB':30}{'before':>10}{'peak':>10}{'over it':>10}{'of core':>10}")
    for kind, found in results.items():
        share = found["over it"] / results["core"]["over it"]
        figures = "".join(f"{found[k]:10.0f}" for k in ("resident before", "peak", "over it"))
        print(f"{KINDS[kind]:30}{figures}{share:10.2f}")
    print(f"one copy of the weights: {results['core']['weights']:.0f} MiB")


if __name__ == "__main__":
    main()
