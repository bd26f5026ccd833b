"""What the runs of `tune_turbo` show: tables, curves of learned against kept, samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import torch
from tune_ground import KEPT, OWN, Ground, Lora, turbo_lora, with_loras
from tune_recipes import TITLES, Trial

from distill_core.evaluation.plots import sample_grid
from distill_core.evaluation.retention import score
from distill_core.files import load_tensors
from distill_core.models import mini

STEPS, SEEDS = (1, 2, 4), (0, 1, 2)
OURS = "tune"
KEPT_WITHIN, KEPT_OURS, LEARNED = 1.5, 1.25, 0.6  # what is asked of the others, of ours, and of ours beside them


class Results:
    """What has been found.  points: of a trial at four steps, as (CPU seconds, learned, kept as a ratio to before)."""

    def __init__(self, out: Path, trials: Iterable[Trial]) -> None:
        self.out = out
        self.found = {
            trial: json.loads((out / trial.name / "result.json").read_text())
            for trial in trials
            if (out / trial.name / "result.json").exists()
        }
        self.before = {
            change: json.loads((out / f"before-{change}.json").read_text())
            for change in {trial.change for trial in self.found}
        }

    def figure(self, trial: Trial, name: str, steps: str = "4", point: int = -1) -> float:
        """A figure of a trial; kept as a ratio to before."""
        value = self.found[trial]["points"][point]["figures"][steps][name]
        return value / self.before[trial.change]["figures"][steps]["kept"] if name == "kept" else value

    def student(self, trial: Trial) -> Lora:
        """The LoRA that a trial ended with."""
        step = self.found[trial]["points"][-1]["step"]
        return load_tensors(self.out / trial.name / f"step-{step}.safetensors")[0]

    def points(self, trial: Trial) -> list[tuple[float, float, float]]:
        return [
            (point["cpu_s"], self.figure(trial, "learned", "4", i), self.figure(trial, "kept", "4", i))
            for i, point in enumerate(self.found[trial]["points"])
        ]

    def seeds(self, recipe: str, pictures: int, change: str) -> list[Trial]:
        wanted = (recipe, pictures, change, 0.0)
        return [t for t in self.found if (t.recipe, t.pictures, t.change, t.rate) == wanted and t.seed in SEEDS]

    def nearest_that_keeps(self, trial: Trial, limit: float = KEPT_WITHIN) -> float:
        """The lowest learned fd of the whole course of a run that keeps within the limit: early students, the last one
        at lower strengths, and the untrained turbo count, too."""
        before = self.before[trial.change]["figures"]["4"]
        found = [(learned, kept) for _, learned, kept in self.points(trial)]
        if (path := self.out / trial.name / "strengths.json").exists():
            weak = json.loads(path.read_text()).values()
            found += [(figures["learned"], figures["kept"] / before["kept"]) for figures in weak]
        return min([before["learned"], *(learned for learned, kept in found if kept <= limit)])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties to speak of."""
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def scores_and_truth(results: Results, trials: Iterable[Trial]) -> tuple[list[float], list[float]]:
    """Of every student the retention score, from its parts as the rule is now, and kept fd as a ratio to before."""
    scores, truth = [], []
    for trial in trials:
        for number, point in enumerate(results.found[trial]["points"]):
            parts = {name: torch.tensor(point["retention"][name]) for name in ("sharpness", "variety", "drift")}
            scores.append(score(**parts).item())
            truth.append(results.figure(trial, "kept", "4", number))
    return scores, truth


def score_beside_truth(results: Results) -> str:
    """How the retention score, which needs no reference, follows the true kept fd over all students."""
    scores, truth = scores_and_truth(results, results.found)
    if len(scores) < 3:
        return ""
    found = rank_correlation([-value for value in scores], truth)
    return f"\nWhat retention says is lost beside kept fd, {len(scores)} students: Spearman {found:.3f}."


def spread(values: Sequence[float], form: str, worst=max) -> str:
    """The median and the worst."""
    return f"{median(values):{form}} ({worst(values):{form}})" if values else "-"


def table(results: Results) -> str:
    """Medians with the worst seed beside, for each change and number of pictures."""
    lines = []
    for change, count in sorted({(t.change, t.pictures) for t in results.found if t.seed in SEEDS}, key=str):
        first, floor = results.before[change]["figures"], results.before[change]["floor"]
        lines += [
            f"\n{count} pictures, {change}\n",
            "| recipe | seeds | learned, 1 step | 2 steps | 4 steps | accuracy | kept, 4 steps "
            f"| learned that keeps within {KEPT_WITHIN:g} | CPU seconds |",
            "|---|---|---|---|---|---|---|---|---|",
            "| the turbo before | | "
            + " | ".join(f"{first[str(s)]['learned']:.1f}" for s in STEPS)
            + f" | {first['4']['accuracy']:.0%} | 1 | | |",
        ]
        for recipe, title in TITLES.items():
            trials = results.seeds(recipe, count, change)
            if not trials:
                continue
            learned = [spread([results.figure(t, "learned", str(s)) for t in trials], ".1f") for s in STEPS]
            kept = spread([results.figure(t, "kept") for t in trials], ".2f")
            accuracy = spread([results.figure(t, "accuracy") for t in trials], ".0%", min)
            within = spread([results.nearest_that_keeps(t) for t in trials], ".1f")
            seconds = spread([results.points(t)[-1][0] for t in trials], ".0f")
            cells = [title, str(len(trials)), *learned, accuracy, kept, within, seconds]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"| held-out pictures | | | | {floor['learned']:.1f} | {floor['accuracy']:.0%} | | | |")
        lines.append(verdict(results, count, change))
    return "\n".join(lines)


def verdict(results: Results, count: int, change: str) -> str:
    """Whether ours is as near as asked, beside the best of the others that keeps."""
    medians = {
        recipe: median([results.nearest_that_keeps(t) for t in trials])
        for recipe in TITLES
        if recipe != OURS and (trials := results.seeds(recipe, count, change))
    }
    trials = results.seeds(OURS, count, change)
    if not medians or not trials:
        return ""
    best = min(medians, key=lambda recipe: medians[recipe])
    learned = median([results.figure(t, "learned") for t in trials])
    kept = median([results.figure(t, "kept") for t in trials])
    ratio = learned / medians[best]
    return (
        f"\nLearned: {learned:.1f}, {ratio:.2f} x the best of the others that keeps ({TITLES[best]}, "
        f"{medians[best]:.1f}; asked: {LEARNED:g}). Kept: {kept:.2f} x before (asked: {KEPT_OURS:g})."
    )


def few_pictures(results: Results) -> str:
    """Whether ours collapses with few pictures."""
    lines = [
        "\nTune Turbo, turned: variety and distance to the nearest own picture, both relative to held-out pictures\n",
        "| own pictures | variety | nearest |",
        "|---|---|---|",
    ]
    for count in (100, 30, 10):
        files = [results.out / t.name / "variety.json" for t in results.seeds(OURS, count, "turned")]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        lines.append(
            f"| {count} | "
            + " | ".join(spread([f[n] for f in found], ".2f", min) for n in ("variety", "nearest"))
            + " |"
        )
    return "\n".join(lines)


def other_rates(results: Results) -> str:
    """The others' courses at other rates, on the seed for tuning."""
    lines = [
        "\nOther rates, 100 pictures, turned, seed for tuning\n",
        "| recipe | rate | learned / kept (CPU seconds), over its course |",
        "|---|---|---|",
    ]
    for trial in [t for t in results.found if t.rate]:
        course = [f"{learned:.0f} / {kept:.2f} ({seconds:.0f} s)" for seconds, learned, kept in results.points(trial)]
        lines.append(f"| {TITLES[trial.recipe]} | {trial.rate:g} | {', '.join(course)} |")
    return "\n".join(lines)


def curves(results: Results, path: Path, pictures: int = 100) -> None:
    """Learned against kept over a training, a panel for each change; a line for each seed, dotted for another rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    changes = sorted({t.change for t in results.found}, reverse=True)
    figure = Figure(figsize=(5.2 * len(changes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(changes), squeeze=False)
    for axis, change in zip(axes[0], changes, strict=True):
        untrained = results.before[change]["figures"]["4"]["learned"]
        for number, (recipe, title) in enumerate(TITLES.items()):
            trials = [t for t in results.found if (t.recipe, t.pictures, t.change) == (recipe, pictures, change)]
            for trial in trials:
                points = [(1.0, untrained), *((kept, learned) for _, learned, kept in results.points(trial))]
                label = title if trial is trials[0] else None
                style = "-" if not trial.rate else ":"
                axis.plot(*zip(*points, strict=True), style, color=f"C{number}", marker=".", lw=1, label=label)
        axis.axvspan(0.5, KEPT_WITHIN, color="C2", alpha=0.08)
        axis.set(xscale="log", yscale="log", title=f"{change}, {pictures} pictures, 4 steps")
        axis.set(xlabel="kept: fd, ratio to before", ylabel="learned: fd")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(labelsize=8, which="both")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def samples(results: Results, grounds: dict[str, Ground], path: Path, pictures: int = 100, seed: int = 0) -> None:
    """Own and kept classes before and after, from the same noises, four steps."""
    change = "turned"
    ground, columns = grounds[change], [mini.CLASS_NAMES[c] for c in (*OWN, *KEPT)]

    def row(lora: Lora | None) -> torch.Tensor:
        backend = with_loras(turbo_lora(), *([lora] if lora else []))
        return torch.cat([ground.samples(backend, 4, classes, len(classes)) for classes in (OWN, KEPT)])

    own, labels = ground.own_pictures(pictures, seed)
    kept = ground.held_out(KEPT, count=1)
    first = torch.stack([own[(labels == c).nonzero()[0, 0]] for c in OWN])
    rows = [("pictures", torch.cat([first, kept])), ("the turbo before", row(None))]
    for recipe, title in TITLES.items():
        trial = Trial(recipe, pictures, change, seed)
        if trial in results.found:
            rows.append((title, row(results.student(trial))))
    few = Trial(OURS, 10, change, seed)
    if few in results.found:
        rows.append(("Tune Turbo, 10 pictures", row(results.student(few))))
    sample_grid(rows, columns, path, f"{pictures} own pictures ({change}) of the left five classes; 4 steps")
