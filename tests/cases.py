"""Run the public cases that the project was tried on, and write what holds now: ``python tests/cases.py [--out FILE]``.

A case is a test with the mark ``case(row, says)``: its row in the log of trials, and what holds now in one line. A row
with several tests holds when all of them do. A skipped test (no ComfyUI) counts as not tried.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Public cases, tried again

Each row is something that a user met with this or another trainer or sampler, and was once tried here by hand.
Now it is a test. This page is made by `python tests/cases.py`, which runs them all.

"""


class Collector:
    """A pytest plugin: the outcomes of all tests with the mark, whose rows `conftest.py` puts into the reports."""

    def __init__(self) -> None:
        self.says: dict[str, list[str]] = defaultdict(list)  # row -> what its tests say
        self.outcomes: dict[str, list[str]] = defaultdict(list)  # row -> outcomes of its tests

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        for row, says in [value for name, value in report.user_properties if name == "case"]:
            self.outcomes[row].append(report.outcome)
            if says not in self.says[row]:
                self.says[row].append(says)

    def table(self) -> str:
        lines = ["| case | what holds now | tests | result |", "|---|---|---|---|"]
        for row in sorted(self.says, key=_order):
            outcomes = self.outcomes[row]
            result = "fails" if "failed" in outcomes else "not tried" if "skipped" in outcomes else "holds"
            lines.append(f"| {row} | {'; '.join(sorted(self.says[row]))} | {len(outcomes)} | {result} |")
        return "\n".join(lines) + "\n"


def _order(row: str) -> list[int | str]:
    """Rows by name, and their numbers as numbers."""
    return [f"{int(part):04d}" if part.isdigit() else part for part in re.split(r"(\d+)", row)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "archive" / "cases.md")
    parser.add_argument("tests", nargs="*", default=[str(ROOT / "tests")], help="files or folders, all by default")
    given = parser.parse_args()
    collector = Collector()
    options = ["-q", "-m", "case", "-n", "auto", "--dist", "loadfile", f"--rootdir={ROOT}"]
    code = pytest.main([*options, *given.tests], plugins=[collector])
    given.out.write_text(HEAD + collector.table(), encoding="utf-8")
    print(f"{len(collector.says)} cases, written to {given.out}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
