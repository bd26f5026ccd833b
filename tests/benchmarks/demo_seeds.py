"""Medians of the demo over seeds, as ratios to the teacher at the same number of steps.

    python tests/benchmarks/demo_seeds.py --out DIR [--seeds 0 1 2]

Runs the demo for every seed whose report is not in DIR yet (about five minutes each on 2 cores) and prints a Markdown
table: the median of the student's score, of the teacher's, and of the ratio of the two within a seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from distill_core.experiments.demo import STUDENT_STEPS, demo

SCORES = ("fd", "fd_pixels", "accuracy")


def report_of(folder: Path, seed: int) -> dict:
    path = folder / f"seed{seed}" / "report.json"
    return json.loads(path.read_text()) if path.exists() else demo(path.parent, seed)


def table(reports: list[dict]) -> str:
    lines = ["| model | steps | fd | fd / teacher | fd pixels | fd pixels / teacher | accuracy |"]
    lines.append("|---|---|---|---|---|---|---|")
    for model in ("teacher", "student", "ladd_only"):
        for steps in reports[0][model]:
            scores = {name: median(r[model][steps][name] for r in reports) for name in SCORES}
            ratios = {
                name: f"{median(r[model][steps][name] / r['teacher'][steps][name] for r in reports):.2f}"
                if model != "teacher" and int(steps) in STUDENT_STEPS
                else ""
                for name in SCORES
            }
            lines.append(
                f"| {model} | {steps} | {scores['fd']:.2f} | {ratios['fd']} | {scores['fd_pixels']:.2f} "
                f"| {ratios['fd_pixels']} | {scores['accuracy']:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    reports = [report_of(args.out, seed) for seed in args.seeds]
    print(table(reports))
    print(f"seconds: {[r['seconds'] for r in reports]}, commit {reports[0]['commit']}")


if __name__ == "__main__":
    main()
