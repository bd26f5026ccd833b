"""Main effects of the size study (LADD section 4.4): what a smaller student, teacher or maker of the data costs.

    python -m distill_core compare --out DIR --images 2000 --entries "LADD, 1 step" "LADD, 1 step, small student" ...
    python tests/benchmarks/size_effects.py DIR

An effect is the mean over the four pairs of runs that differ in it alone, smaller less larger, in each seed, with the
95 % interval of the bootstrap over the evaluated items.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import torch

from distill_core.evaluation.intervals import Figure
from distill_core.experiments.entries import DATA, SIZED, STUDENT, TEACHER
from distill_core.experiments.results import figure_of
from distill_core.experiments.tables import read_results

METRICS = {"fd": 1, "fd_pixels": 1, "accuracy": 100, "coverage": 100, "coherence": 100}  # and their scale
ROLES = (STUDENT,), (TEACHER,), (DATA,), (TEACHER, DATA)


def mean(figures: list[Figure]) -> Figure:
    value = sum(figure.value for figure in figures) / len(figures)
    return Figure(value, torch.stack([figure.replicates for figure in figures]).mean(0))


def effect(cells: dict[frozenset[str], Figure], roles: set[str]) -> Figure:
    """Smaller less larger in the roles together, over all sizes of the others."""
    smaller, larger = ([cells[key] for key in cells if key & roles == these] for these in (roles, set()))
    return mean(smaller) - mean(larger)


def main() -> None:
    results = read_results(Path(sys.argv[1]))
    if lacking := [name for name in SIZED if name not in results]:
        sys.exit(f"no results of {', '.join(lacking)} in {sys.argv[1]}: run them with compare first")
    seeds = sorted(set.intersection(*({run["seed"] for run in results[name]} for name in SIZED)))
    print("| figure | smaller | median | each seed, 95 % intervals |\n|---|---|---|---|")
    for metric, scale in METRICS.items():
        effects: dict[str, list[Figure]] = {" and ".join(roles): [] for roles in ROLES}
        for seed in seeds:
            runs = {name: run for name in SIZED for run in results[name] if run["seed"] == seed}
            cells = {frozenset(SIZED[name].small): figure_of(run["scores"]["1"], metric) for name, run in runs.items()}
            scaled = {key: Figure(scale * f.value, scale * f.replicates) for key, f in cells.items() if f is not None}
            for roles in ROLES:
                effects[" and ".join(roles)].append(effect(scaled, set(roles)))
        for role, figures in effects.items():
            spelt = ", ".join(f"{figure:+.2f}" for figure in figures)
            print(f"| {metric} | {role} | {median(f.value for f in figures):+.2f} | {spelt} |")


if __name__ == "__main__":
    main()
