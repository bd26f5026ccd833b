"""Retention beside the true distance: ``python tests/benchmarks/retention_beside_truth.py STUDY --out FILE.png``.

STUDY is the folder of `tune_turbo`, whose runs are students of all recipes early and late. The true distance is the
Fréchet distance of samples of the kept classes to test pictures, which the score does not see.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tune_recipes import TITLES, Trial
from tune_results import Results, rank_correlation, scores_and_truth

BANDS = ((0.9, 1.0), (0.8, 0.9), (0.6, 0.8), (0.0, 0.6))  # of the score
TICKS = (1, 2, 5, 10, 20, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    files = sorted(args.study.glob("*/result.json"))
    results = Results(args.study, [Trial(**json.loads(file.read_text())["trial"]) for file in files])
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for recipe, title in TITLES.items():
        trials = [trial for trial in results.found if trial.recipe == recipe]
        if trials:
            scores, truth = scores_and_truth(results, trials)
            axis.scatter(truth, scores, s=18, label=title)
    axis.set(xscale="log", xlabel="Fréchet distance of kept prompts, ratio to before", ylabel="retention", ylim=(0, 1))
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="lower left")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    scores, truth = scores_and_truth(results, results.found)
    found = rank_correlation([-value for value in scores], truth)
    print(f"{len(scores)} students of {len(results.found)} runs: Spearman {found:.3f}")
    for low, high in BANDS:
        inside = sorted(t for s, t in zip(scores, truth, strict=True) if low <= s < high)
        if inside:
            median = inside[len(inside) // 2]
            print(f"| {low:g} to {high:g} | {len(inside)} | {median:.2f} | {inside[0]:.2f} to {inside[-1]:.2f} |")


if __name__ == "__main__":
    main()
