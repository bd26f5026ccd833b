"""How fast the server answers and the page draws while LADD Trainer works, beside idle and beside core's KSampler.

    python tests/benchmarks/responsiveness.py [--seconds 40]

A real ComfyUI server on the CPU with one thread, Chromium with the workflow open and latent previews on. The mini model
trains as `distil_mini_ladd` ships it, but for a small dataset and samples every 10 steps. Needs what the browser tests
need. The browser draws without a GPU, so its frames are slow also when idle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "host"), str(REPO / "tools")]

from browser import drive  # noqa: E402
from server import Host  # noqa: E402

from distill_core.experiments.demo import machine  # noqa: E402

TRAINER, SAMPLER = "TurboDistillLADDTrainer", "KSampler"
ASKED = ("/queue", "/system_stats")
PAUSE = 0.05  # seconds between two requests
LONG = 10_000  # steps, so that the node still works when the time is up
FEW = {"count": 64, "steps": 4, "batch_size": 64}  # teacher latents


def training(run_name: str, steps: int) -> tuple[str, str, dict]:
    trainer = {"run_name": run_name, "steps": steps, "preview_every": 10}
    return "distil_mini_ladd", TRAINER, {"TurboDistillTeacherLatents": FEW, TRAINER: trainer}


def sampling(steps: int) -> tuple[str, str, dict]:
    return "lora_in_ksampler", SAMPLER, {SAMPLER: {"steps": steps}, "EmptySD3LatentImage": {"batch_size": 64}}


JOBS = {  # workflow, the node whose first preview starts the clock, widgets
    "idle": ("distil_mini_ladd", None, {}),
    "core's KSampler, 64 latents": sampling(LONG),
    "LADD Trainer": training("long", LONG),
    "KSampler, to the end and after": sampling(40),
    "LADD Trainer, to the end and after": training("short", 20),  # report, LoRA, pictures of teacher and student
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40)
    args = parser.parse_args()
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-")))
    try:
        host.start()
        print(machine())
        columns = (*(f"GET {path}, ms" for path in ASKED), "requests", "between frames, ms", "frames", "previews")
        print(f"| | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
        for name, (workflow, node, widgets) in JOBS.items():
            print(row(name, *measured(host, workflow, node, widgets, args.seconds)), flush=True)
    finally:
        host.stop()


def measured(host: Host, workflow: str, node: str | None, widgets: dict, seconds: float) -> tuple[dict, dict]:
    """Milliseconds of each answer by path from the node's first preview on, and what frontend.js says."""
    graph = json.loads((REPO / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    for entry in graph["nodes"]:
        if entry["type"] == "LoraLoaderModelOnly":  # its file is left by a finished run only
            entry["mode"] = 4  # bypassed
    job = {
        "name": workflow,
        "graph": graph,
        "settings": {"Comfy.Execution.PreviewMethod": "latent2rgb"},
        "set": widgets,
        "frames": {"seconds": seconds, "after": node},
        "timeout": 300,
    }
    done: list[dict] = []
    page = threading.Thread(target=lambda: done.extend(drive(host.url, [job])), daemon=True)
    page.start()
    asked = []
    while page.is_alive():
        for path in ASKED:
            start, clock = time.time(), time.perf_counter()
            host.get(path)
            asked.append((path, start, 1000 * (time.perf_counter() - clock)))
            time.sleep(PAUSE)
    frames = done[0]["frames"]
    inside = [entry for entry in asked if frames["from"] <= entry[1] <= frames["to"]]
    while host.get("/queue")["queue_running"]:
        time.sleep(0.5)
    return {path: [ms for asked_path, _, ms in inside if asked_path == path] for path in ASKED}, done[0]


def row(name: str, answers: dict[str, list[float]], page: dict) -> str:
    """Median, 95 % and worst of each."""
    gaps = page["frames"]["gaps"]
    *server, drawn = (
        " / ".join(f"{q:.0f}" for q in np.percentile(ms, (50, 95, 100))) for ms in (*answers.values(), gaps)
    )
    cells = (name, *server, sum(map(len, answers.values())), drawn, len(gaps) + 1, sum(page["previews"].values()))
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
