"""The tables of docs/full_size.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "full_size.md"
BEGIN, END = "<!-- made by run_full_size.py -->\n", "<!-- end of what is made -->\n"
COLUMNS = (
    "model",
    "workflow",
    "file GB",
    "batch",
    "peak GB",
    "CPU s",
    "of which a step",
    "LoRA keys",
    "left over",
    "MB",
)
EFFECTS = ("model", "compared in", "LoRA's change", "error", "made stronger: change", "error of it")


def update_page(rows: dict[str, dict]) -> None:
    """Write the rows into the page, in place of those that stand there."""
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} has lost one of its marks"
    PAGE.write_text(before + BEGIN + "\n" + text(list(rows.values())) + "\n" + END + after, encoding="utf-8")


def text(rows: list[dict]) -> str:
    """Figures, effects of the LoRAs, and all words."""
    run = [row for row in rows if "refused" not in row]
    parts = [
        table(COLUMNS, map(figures, run)),
        "### The saved LoRA\n",
        table(EFFECTS, map(effects, run)),
        "### What was said\n",
        table(("model", "preflight", "its CPU s", "trainer"), map(words, run)),
        *(refusal(row) for row in rows if "refused" in row),
    ]
    return "\n".join(parts)


def table(names: tuple[str, ...], rows) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def figures(row: dict) -> list:
    name = f"`{row['workflow']}`" if " " not in row["workflow"] else row["workflow"]
    return [
        *(row["model"], name, f"{row['model GB']:.2f}", row["batch"], f"{row['peak GB']:.1f}"),
        *(f"{row['CPU s']:.0f}", f"{row['step CPU s']:.0f}"),
        *(row["LoRA keys"], row["keys not loaded"], f"{row['LoRA MB']:.0f}"),
    ]


def effects(row: dict) -> list:
    shares = (row[key] for key in ("change", "error", "strong change", "strong error"))
    return [row["model"], row["compared in"], *(f"{share:.2g}" for share in shares)]


def words(row: dict) -> list:
    refused = row["preflight"] != "passed"
    return [
        row["model"],
        one_line(row["preflight"]),
        f"{row['preflight CPU s']:.0f}" if refused else "",
        one_line(row["said"]),
    ]


def refusal(row: dict) -> str:
    return f"{row['model']} is refused: {one_line(row['refused'])}\n"


def one_line(said: str) -> str:
    """A text as a cell of a table: folders of this machine are cut to their name."""
    said = re.sub(r"(?<![\w.])/(?:[^\s/|]+/)+", "", said)
    return "; ".join(line.strip(" -") for line in said.replace("|", "\\|").splitlines() if line.strip())
