"""A workflow on the mini model in a real ComfyUI: how long it takes, what its LoRA reaches, and the picture.

python tests/benchmarks/distil_in_graph.py --out DIR [--workflow distil_mini_add] [--images 100] [--picture FILE.jpg]

Needs ComfyUI (tests/host/server.py says where it is looked for). ``--images``: of each class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "host"), str(REPO / "tools")]

from graphs import class_samples, guided_teacher, saved_student  # noqa: E402
from make_workflows import numbered  # noqa: E402
from server import Host  # noqa: E402

from distill_core.evaluation.metrics import mini_scores  # noqa: E402
from distill_core.experiments.demo import machine  # noqa: E402
from distill_core.files import git_commit, save_json  # noqa: E402
from distill_core.models import mini  # noqa: E402
from workflows import WORKFLOWS  # noqa: E402

NAMES = ("distil_mini_ladd", "distil_mini_add", "distil_mini_diffusion2gan", "distil_mini_dmd2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workflow", choices=NAMES, default=NAMES[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-", dir=args.out)))
    try:
        host.start()
        report = measure(host, args.workflow, args.images)
    finally:
        host.stop()
    picture = next((host.base_dir / "output").glob(f"{args.workflow}_report_*.png"))
    Image.open(picture).convert("RGB").save(args.picture or args.out / f"{args.workflow}.jpg", quality=85)
    save_json(args.out / f"{args.workflow}.json", report | {"commit": git_commit(), "machine": machine()})


def measure(host: Host, name: str, images: int) -> dict:
    """Seconds of the workflow, and fd of teacher and student by number of steps."""
    process, started = psutil.Process(host.process.pid), time.monotonic()
    before = process.cpu_times()
    host.run(numbered(WORKFLOWS[name]), 7200)
    after = process.cpu_times()
    report = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": after.user + after.system - before.user - before.system,
    }
    labels, evaluate = torch.arange(len(mini.CLASS_NAMES)).repeat_interleave(images), mini_scores
    most = WORKFLOWS[name]["train"]["inputs"]["target_steps"]
    for steps in (n for n in (1, 2, 4) if n <= most):
        teacher, guided = guided_teacher(steps)
        latents = {
            "teacher": class_samples(host, teacher, ["base", 0], images, **guided),
            "student": class_samples(
                host, saved_student(f"{name}_00001_.safetensors"), ["model", 0], images, steps=steps
            ),
        }
        report[str(steps)] = {name: evaluate(x, labels) for name, x in latents.items()}
        scores = {name: score["fd"] for name, score in report[str(steps)].items()}
        print(f"{steps} steps: fd {scores}, ratio {scores['student'] / scores['teacher']:.3f}", flush=True)
    print(f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} s of one processor")
    return report


if __name__ == "__main__":
    main()
