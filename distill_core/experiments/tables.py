"""The results of `compare` as tables and a picture: medians over seeds with their range, and the papers' claims."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from ..evaluation import plots
from .claims import claims_table, median_and_range
from .entries import ENTRIES


def read_results(out: Path) -> dict[str, list[dict]]:
    """All results in a folder by entry, the teacher's first."""
    found: dict[str, list[dict]] = {name: [] for name in ("teacher", *ENTRIES)}
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["entry"], []).append(result)
    return {name: results for name, results in found.items() if results}


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: medians over seeds with the range, an entry and step count a row; forwards are items through networks
    in training, backbone, copies and vision network together."""
    lines = ["| entry | steps | seeds | fd | fd pixels | accuracy | diversity | drift | cpu s | wall s | forwards |"]
    lines.append("|---" * 11 + "|")
    for name, runs in results.items():
        for steps in runs[0]["scores"]:
            scores = [run["scores"][steps] for run in runs]
            cells = [
                median_and_range([s[key] for s in scores]) if key in scores[0] else "" for key in ("fd", "fd_pixels")
            ]
            cells += [median_and_range([100 * s["accuracy"] for s in scores], "{:.1f}")]
            cells += [median_and_range([s["diversity"] for s in scores])]
            cells += [median_and_range([s["drift"] for s in scores]) if "drift" in scores[0] else ""]
            first = steps == next(iter(runs[0]["scores"])) and "cpu_s" in runs[0]
            cells += [f"{median(run[key] for run in runs):.0f}" if first else "" for key in ("cpu_s", "wall_s")]
            cells += [str(sum(runs[0]["forwards"].values())) if first else ""]
            lines.append(f"| {name} | {steps} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(out: Path) -> str:
    """Write table.md, claims.md and compare.png for what has been run; returns both tables."""
    results = read_results(out)
    parts = {"table.md": table(results), "claims.md": claims_table(results)}
    for file, text in parts.items():
        (out / file).write_text(text + "\n")
    fd = {name: {s: [r["scores"][s]["fd"] for r in runs] for s in runs[0]["scores"]} for name, runs in results.items()}
    plots.comparison(fd, out / "compare.png")
    return "\n\n".join(parts.values())
