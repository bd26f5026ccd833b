"""Where sampling starts, over denoise: core's KSampler beside our two modes at 1, 2, 4 and 8 steps.

    python tests/benchmarks/denoise_curves.py [--out docs/denoise.png]

Core's levels come from ComfyUI's own KSampler class, run in its Python on the tiny SD3 network of the host tests
(scheduler "simple", shift 3); ours from the same trained lists.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "host")]
STEPS = (1, 2, 4, 8)
DENOISES = [i / 200 for i in range(1, 201)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TESTS.parent / "docs" / "denoise.png")
    args = parser.parse_args()
    from server import COMFYUI, HOST_FOUND, HOW_TO, PYTHON

    if not HOST_FOUND:
        sys.exit(HOW_TO)
    environment = os.environ | {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [PYTHON, __file__, "--in-host", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        core = json.loads(Path(folder, "core.json").read_text())
    draw(core, ours(), args.out)
    for steps in STEPS:
        print(f"{steps} steps: core has {len(set(core[str(steps)]))} start levels, ours {len(set(ours()[steps]))}")


def ours() -> dict[int, list[float]]:
    """The start of `snap_denoise`, which is that of `respace_denoise`."""
    from distill_core.diffusion.schedules import shifted_sigmas, snap_denoise

    grids = {steps: shifted_sigmas(steps, shift_alpha=3.0) for steps in STEPS}
    return {steps: [snap_denoise(grid, d)[0].item() for d in DENOISES] for steps, grid in grids.items()}


def draw(core: dict[str, list[float]], exact: dict[int, list[float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(STEPS), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, steps in zip(axes, STEPS, strict=True):
        axis.plot(DENOISES, core[str(steps)], drawstyle="steps-post", color="tab:red", label="KSampler, simple")
        axis.plot(DENOISES, exact[steps], color="tab:blue", label="Turbo Sampler, both modes")
        axis.set(title=f"{steps} step{'s' * (steps > 1)}", xlabel="denoise", xlim=(0, 1), ylim=(0, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("start level (sigma)")
    axes[0].legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def in_host(folder: Path) -> None:
    """Core's start levels; everything of the host is imported here, after its options are set."""
    from launch import ImportHooks

    sys.meta_path.insert(0, ImportHooks())
    sys.path[0] = os.environ["COMFYUI_PATH"]
    sys.path.append(str(TESTS / "host"))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.samplers
    import comfy.sd
    import tiny_models

    model = comfy.sd.load_diffusion_model(tiny_models.write("sd3", folder))

    def start(steps: int, denoise: float) -> float:
        return comfy.samplers.KSampler(model, steps, "cpu", "euler", "simple", denoise).sigmas[0].item()

    core = {steps: [start(steps, denoise) for denoise in DENOISES] for steps in STEPS}
    (folder / "core.json").write_text(json.dumps(core))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-host"]:
        in_host(Path(sys.argv[2]))
    else:
        main()
