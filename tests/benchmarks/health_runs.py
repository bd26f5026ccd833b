"""Runs of known outcome on the mini model, and what `health` says of each: ``python tests/benchmarks/health_runs.py``.

60 steps of 16 items each (about two minutes a run on one core): sound ones, and ones that are broken on purpose. The
outcome is the Fréchet distance of 400 one-step samples to real data; a student that stands still shows where it began.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.data.cache import CacheConfig
from distill_core.data.dataset import LatentDataset
from distill_core.evaluation.metrics import mini_scores  # noqa: E402
from distill_core.experiments.demo import (  # noqa: E402
    LADD_SETTINGS,
    LEVELS,
    DemoConfig,
    DemoRun,
    cache_dataset,
    draw_samples,
    open_run,
)
from distill_core.models.mini import GUIDANCE, mini_backend, mini_conditioning  # noqa: E402
from distill_core.training.loop import TrainConfig, train  # noqa: E402
from distill_core.training.monitor import Health  # noqa: E402

SOUND = TrainConfig(steps=60, batch_size=16, student_lr=2e-4, discriminator_lr=4e-3, seed=100)
MIXED = replace(LADD_SETTINGS, terms={"adversarial": 1.0, "pairs": 1.0})
RUNS = {
    "pure LADD": DemoRun(LADD_SETTINGS, SOUND),
    "LADD + pairs": DemoRun(MIXED, replace(SOUND, student_lr=6e-4)),
    "heads do not learn": DemoRun(LADD_SETTINGS, replace(SOUND, discriminator_lr=1e-12)),
    "heads see only noise": DemoRun(replace(LADD_SETTINGS, renoise_mean=6.0, renoise_std=0.3), SOUND),
    "student's rate x 15": DemoRun(LADD_SETTINGS, replace(SOUND, student_lr=3e-3)),
    "student's rate x 100": DemoRun(LADD_SETTINGS, replace(SOUND, student_lr=2e-2)),
    "student stands still": DemoRun(LADD_SETTINGS, replace(SOUND, student_lr=1e-7, discriminator_updates=2)),
}


def observe(name: str, data: Path) -> dict:
    """Train one run to its end, whatever health says, and score the student."""
    run, _ = open_run(LatentDataset(data), DemoConfig(), RUNS[name])
    health, conditions = Health(patience=20), []
    for event in train(run):
        conditions.append(health.update(event.logs))
    with run.ema_weights(), torch.no_grad():
        classes, _ = mini_conditioning()
        samples = draw_samples(run.method.student, 1, "ancestral", 5000, 400, classes)
    last = conditions[-1]
    return {
        "run": name,
        "words": list(dict.fromkeys(c.word for c in conditions)),
        "separation": last.separation,
        "accuracy": last.accuracy,
        "gap": last.logit_gap,
        "diversity": last.diversity,
        "fd": mini_scores(samples, torch.arange(400) % 10)["fd"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a dataset of the mini model (default: made anew)")
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=f"of {list(RUNS)}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or Path(folder)
        if not args.data:
            cache = CacheConfig(count=1024, steps=16, guidance=GUIDANCE, sizes=((8, 8),), state_sigmas=LEVELS, seed=100)
            cache_dataset(mini_backend(), cache, data)
        print("| run | fd | separation | accuracy | gap | diversity | words |\n|---|---|---|---|---|---|---|")
        for name in args.runs:
            found = observe(name, data)
            figures = " | ".join(f"{found[k]:.2f}" for k in ("fd", "separation", "accuracy", "gap", "diversity"))
            print(f"| {name} | {figures} | {', '.join(found['words'])} |", flush=True)
            json.dump(found, sys.stderr)
            sys.stderr.write("\n")


if __name__ == "__main__":
    main()
