"""What a sampler costs beside the network: Turbo Sampler and core's KSampler with lcm, in turns, in one process.

    python tests/benchmarks/sampler_overhead.py [--repeats 60] [--out FILE.json]

Runs itself inside ComfyUI's Python (tests/host/server.py says where that is looked for) on the tiny SD3 network of the
host tests, 4 steps at cfg 1. Counted is what happens outside the network's forward: tensor operations, and CPU time,
the median over the repeats, which alternate between the two nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "host"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from server import COMFYUI, HOST_FOUND, HOW_TO, PYTHON

    if not HOST_FOUND:
        sys.exit(HOW_TO)
    environment = os.environ | {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [PYTHON, __file__, "--in-host", folder, str(args.repeats)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        measured = json.loads(Path(folder, "result.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=TESTS, capture_output=True, text=True)
    measured |= {"commit": commit.stdout.strip(), "repeats": args.repeats, "cores": os.cpu_count(), "threads": 1}
    print(json.dumps(measured, indent=1))
    if args.out:
        args.out.write_text(json.dumps(measured, indent=1) + "\n")


def in_host(folder: Path, repeats: int) -> None:
    """The measurement; everything of the host is imported here, after its options are set."""
    from launch import ImportHooks, load_pack

    sys.meta_path.insert(0, ImportHooks())
    sys.path[0] = os.environ["COMFYUI_PATH"]
    sys.path.append(str(TESTS / "host"))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy_api.latest  # noqa: F401  the pack wants it
    import tiny_models
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import nodes

    load_pack("pack")
    from pack.nodes.sampling import TurboSampler

    class CountOps(TorchDispatchMode):
        """Counts tensor operations, but not those of the network."""

        def __init__(self) -> None:
            super().__init__()
            self.count, self.inside = 0, False

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += not self.inside
            return function(*args, **(kwargs or {}))

    model = comfy.sd.load_diffusion_model(tiny_models.write("sd3", folder))
    positive, network = tiny_models.conditioning("sd3"), model.model.diffusion_model
    clock = {"forward": 0.0, "start": 0.0}
    ops = CountOps()

    def before(*_) -> None:
        ops.inside, clock["start"] = True, time.process_time()

    def after(*_) -> None:
        ops.inside = False
        clock["forward"] += time.process_time() - clock["start"]

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)

    def turbo(latent: dict) -> None:
        choice = dict(preset="sd3.5-large-turbo", steps=4, denoise=1.0, denoise_mode="snap", sampler="renoise")
        TurboSampler.execute(model, positive, latent, seed=1, cfg=1.0, **choice)

    def core(latent: dict) -> None:
        nodes.common_ksampler(model, 1, 4, 1.0, "lcm", "simple", positive, positive, latent)

    def outside(run, latent: dict) -> float:
        """CPU milliseconds outside the network."""
        clock["forward"], start = 0.0, time.process_time()
        run(latent)
        return 1000 * (time.process_time() - start - clock["forward"])

    result = {}
    with torch.inference_mode():
        for batch in (1, 4):
            latent = {"samples": torch.zeros(batch, 16, 32, 32)}
            times = {"turbo": [], "core": []}
            for repeat in range(repeats + 3):
                for name, run in (("turbo", turbo), ("core", core))[:: 1 if repeat % 2 else -1]:
                    taken = outside(run, latent)
                    if repeat >= 3:
                        times[name].append(taken)
            entry = {f"{name} CPU ms": round(statistics.median(taken), 3) for name, taken in times.items()}
            for name, run in (("turbo", turbo), ("core", core)):
                ops.count = 0
                with ops:
                    run(latent)
                entry[f"{name} operations"] = ops.count
            entry["CPU ratio"] = round(entry["turbo CPU ms"] / entry["core CPU ms"], 3)
            entry["operations ratio"] = round(entry["turbo operations"] / entry["core operations"], 3)
            result[f"batch {batch}"] = entry
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-host"]:
        in_host(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
