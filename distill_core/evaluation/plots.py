"""Pictures of a run: labelled sample grids and training curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from torch import Tensor


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def sample_grid(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str], path: str | Path, title: str = "") -> None:
    """One labelled row of images [N, 3, H, W] in [-1, 1] per entry, N labelled columns; written as PNG."""
    figure, axes = _figure(1.0 * len(columns) + 1.6, 1.0 * len(rows) + 0.7, len(rows), len(columns))
    for axis_row, (label, images) in zip(axes, rows, strict=True):
        pixels = ((images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for axis, image in zip(axis_row, pixels, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def smooth(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average with bias correction."""
    average, out = 0.0, []
    for i, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        out.append(average / (1 - decay**i))
    return out


def line(logs: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """A value at every step, and what to draw strongly: its moving average.

    One that only some steps have (validation) stays as it is until the next, and is not averaged; empty where none has.
    """
    known = [entry[name] for entry in logs if name in entry]
    if len(known) == len(logs) or not known:
        return known, smooth(known)
    values, last = [], known[0]
    for entry in logs:
        last = entry.get(name, last)
        values.append(last)
    return values, values


# What a step logs beside losses and gradient norms (`training.loop.Event`, `training.run_folder.LogFile`).
OF_IMAGES, OF_VERDICTS = (
    {"diversity", "spread", "size"},
    {"accuracy", "logit_gap", "logit_spread", "r1", "approximate_r1"},
)
OF_PAIRS = {  # of method = "dpo": title of a panel -> names
    "pairs in the right order": ["implicit_accuracy", "validation_accuracy"],
    "margin of the pairs": ["margin"],
    "errs less than the reference by": ["chosen", "rejected"],
}
STATISTICS = (
    {"step", "health", "rate"} | OF_IMAGES | OF_VERDICTS | {name for names in OF_PAIRS.values() for name in names}
)
Panel = tuple[str, list[str]]


def panels(logs: Sequence[dict[str, float]]) -> list[Panel]:
    """The panels of a run's curves as (title, names in the logs), whatever terms and players its method has: four, and
    those of pairs where there are some."""
    names = list(dict.fromkeys(name for entry in logs for name in entry))
    norms = [name for name in names if name.endswith("_grad_norm")]
    losses = [name for name in names if name not in STATISTICS and name not in norms]
    return [
        ("losses", losses),
        ("discriminator accuracy", ["accuracy"]),
        ("logit gap, real - fake", ["logit_gap"]),
        ("gradient norms", norms),
        *((title, own) for title, own in OF_PAIRS.items() if set(own) & set(names)),
    ]


def training_curves(runs: dict[str, list[dict[str, float]]], path: str | Path) -> None:
    """Losses, discriminator accuracy, logit gap and gradient norms over steps: a row a run, raw faint, smoothed strong.

    runs: for each run its events' logs in order.
    """
    figure, axes = _figure(14, 3 * len(runs), len(runs), max(len(panels(logs)) for logs in runs.values()))
    for axis_row, (run, logs) in zip(axes, runs.items(), strict=True):
        for axis, (title, names) in zip(axis_row, panels(logs), strict=False):
            for name in names:
                values, strong = line(logs, name)
                if values:
                    (drawn,) = axis.plot(strong, label=name.replace("_", " "))
                    axis.plot(values, alpha=0.2, color=drawn.get_color(), lw=0.7)
            axis.set_title(f"{run}: {title}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            if axis.lines:
                axis.legend(fontsize=7)
        axis_row[1].axhline(0.5, color="grey", lw=0.7, ls=":")
        axis_row[1].set_ylim(0, 1)
    figure.savefig(path, dpi=90)


def comparison(scores: dict[str, dict[str, list[float]]], path: str | Path) -> None:
    """Fréchet distance of each entry at each step count, on a log scale: median over seeds as a bar, seeds as dots.

    scores: entry -> steps -> one value a seed. What only one entry has (the teacher at 25 steps) is a line everywhere.
    """
    by_count: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, by_steps in scores.items():
        for steps, values in by_steps.items():
            by_count[steps][name] = values
    counts = sorted((steps for steps, of in by_count.items() if len(of) > 1), key=int) or sorted(by_count, key=int)
    alone = {f"{name}, {steps} steps": of[name] for steps, of in by_count.items() for name in of if steps not in counts}
    figure, axes = _figure(1.2 + 3.1 * len(counts), 1.6 + 0.28 * len(scores), 1, len(counts))
    names, ticks = list(scores)[::-1], [1, 2, 5, 10, 20, 50, 100]
    least = min(value for of in by_count.values() for values in of.values() for value in values)
    for axis, steps in zip(axes[0], counts, strict=True):
        for row, name in enumerate(names):
            values = by_count[steps].get(name, [])
            if values:
                axis.barh(row, median(values), color="C1" if name == "teacher" else "C0", alpha=0.6)
                axis.plot(values, [row] * len(values), "k.", ms=4)
        for label, values in alone.items():
            axis.axvline(median(values), color="C1", ls=":", label=label)
        first = axis is axes[0][0]
        labels = names if first else [""] * len(names)
        axis.set(xscale="log", xlim=(0.8 * least, None), yticks=range(len(names)), yticklabels=labels)
        low, high = axis.get_xlim()
        axis.set(ylim=(-0.8, len(names) - 0.2), xticks=[t for t in ticks if low < t < high])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_title(f"{steps} step{'s' * (steps != '1')}: Fréchet distance", fontsize=9)
        axis.tick_params(labelsize=8)
    if alone:
        axes[0][-1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)
