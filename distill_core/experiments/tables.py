"""The results of `compare` as tables and a picture: medians over seeds with their intervals, and the papers' claims."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from ..evaluation import plots
from .claims import cell, claims_table
from .entries import ENTRIES
from .results import CLOTHES, figure_of, read_result

COLUMNS = ("fd", "fd_pixels", "accuracy", "diversity", "coverage", "detail_ratio", "coherence", "drift")


def read_results(out: Path) -> dict[str, list[dict]]:
    """All results in a folder by entry, the teacher's first."""
    found: dict[str, list[dict]] = {name: [] for name in ("teacher", *ENTRIES)}
    for path in sorted(out.glob("*.json")):
        result = read_result(path)
        found.setdefault(result["entry"], []).append(result)
    return {name: results for name, results in found.items() if results}


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: medians over seeds with their intervals (`claims.cell`), an entry and step count a row.

    Where there are several word groups, accuracy is their mean, and each has a column of its own. forwards: items
    through networks in training, backbone, copies and vision network together.
    """
    found = {name for runs in results.values() for scores in runs[0]["scores"].values() for name in scores}
    groups = sorted(name for name in found if name.startswith("accuracy_") and not name.endswith("_pixels"))
    columns = [*COLUMNS, *groups]
    names = [name.replace("_", " ") for name in columns]
    lines = [f"| entry | steps | seeds | {' | '.join(names)} | cpu s | wall s | forwards |"]
    lines.append("|---" * (len(columns) + 6) + "|")
    for name, runs in results.items():
        for steps in runs[0]["scores"]:
            scores = [run["scores"][steps] for run in runs if steps in run["scores"]]
            cells = []
            for key in columns:
                form, scale = (".1f", 100.0) if key.startswith("accuracy") else (".2f", 1.0)
                figures = [figure for s in scores if (figure := figure_of(s, key)) is not None]
                cells.append(cell(figures, form, scale) if len(figures) == len(scores) else "")
            first = steps == next(iter(runs[0]["scores"])) and "cpu_s" in runs[0]
            cells += [f"{median(run[key] for run in runs):.0f}" if first else "" for key in ("cpu_s", "wall_s")]
            cells += [str(sum(runs[0]["forwards"].values())) if first else ""]
            lines.append(f"| {name} | {steps} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(out: Path) -> str:
    """Write table.md, claims.md and compare.png for what has been run; returns both tables."""
    results = read_results(out)
    grounds = sorted({run.get("ground", CLOTHES) for runs in results.values() for run in runs})
    head = f"Ground: {', '.join(grounds)}."
    parts = {"table.md": f"{head}\n\n{table(results)}", "claims.md": claims_table(results)}
    for file, text in parts.items():
        (out / file).write_text(text + "\n")
    fd = {
        name: {s: [r["scores"][s]["fd"].value for r in runs] for s in runs[0]["scores"]}
        for name, runs in results.items()
    }
    plots.comparison(fd, out / "compare.png")
    return "\n\n".join(parts.values())
