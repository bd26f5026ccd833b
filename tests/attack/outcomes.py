"""Counts what became of each case, by kind, and keeps examples of what must not happen; for the commands here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

GOOD = ("success", "our sentence", "refused by the host")
EXAMPLES = 5  # kept of each kind of failure


class Outcomes:
    """A table of kind -> outcome -> number. An outcome that is none of `GOOD` is a failure."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.table: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[dict[str, Any]] = []

    def add(self, kind: str, outcome: str, case: Any = None, said: str = "") -> None:
        self.table[kind][outcome] += 1
        if outcome not in GOOD and sum(f["outcome"] == outcome and f["kind"] == kind for f in self.failures) < EXAMPLES:
            self.failures.append({"kind": kind, "outcome": outcome, "case": case, "said": said[-3000:]})

    @property
    def bad(self) -> int:
        return sum(n for row in self.table.values() for outcome, n in row.items() if outcome not in GOOD)

    def answered(self, outcome: str) -> int:
        """How many cases ended so."""
        return sum(row[outcome] for row in self.table.values())

    def markdown(self) -> str:
        others = sorted({o for row in self.table.values() for o in row} - set(GOOD))
        columns = [*GOOD, *others]
        lines = [f"| {self.title} | cases | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        rows = [*sorted(self.table.items()), ("all", sum(self.table.values(), Counter()))]
        for kind, row in rows:
            lines.append(f"| {kind} | {sum(row.values())} | {' | '.join(str(row[c]) for c in columns)} |")
        return "\n".join(lines)

    def save(self, folder: Path, **facts: Any) -> None:
        """outcomes.json and table.md in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {**facts, "table": {k: dict(v) for k, v in self.table.items()}, "failures": self.failures}
        (folder / "outcomes.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
        (folder / "table.md").write_text(self.markdown() + "\n")


def listing(*roots: Path, without: tuple[str, ...] = ()) -> dict[str, int]:
    """Path -> size of every file below the roots, but for folders of these names."""
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            if not path.is_symlink() and path.is_file() and not set(path.relative_to(root).parts) & set(without):
                found[str(path)] = path.stat().st_size
    return found
