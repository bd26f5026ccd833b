"""What texts say is there: keys of the TOML file, documents, numbers of presets, tables that render."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from distill_core.presets.table import presets
from distill_core.training.config import SECTIONS

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "distill_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")])
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "web" / "docs").glob("*.md")])
KEY = re.compile(r"\[([a-z][a-z0-9_]*)\] ([a-z][a-z_]*)\b")
NOTES = re.compile(r"\b(?:DESIGN|papers\.md|host\.md|style\.md|docs/[\w./-]+\.md|[\w/]+\.py)\b")


def strings(path: Path) -> list[str]:
    """All texts in a source file: docstrings, messages, parts of f-strings, and joined neighbours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    joined = ["".join(part.value for part in node.values if isinstance(part, ast.Constant)) for node in formatted]
    return joined + [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_that_a_message_advises_exist(path):
    """`[section] key`, as errors name what to set."""
    wrong = [
        f"[{section}] {key}"
        for text in strings(path)
        for section, key in KEY.findall(text)
        if section in SECTIONS and key not in {f.name for f in fields(SECTIONS[section])}
    ]
    assert not wrong, wrong


def test_the_search_for_keys_finds_them():
    found = [key for path in SOURCES for text in strings(path) for key in KEY.findall(text) if key[0] in SECTIONS]
    assert {("vision", "network"), ("vision", "decoder"), ("model", "path"), ("prompts", "prompts")} <= set(found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_and_files_that_a_text_cites_exist(path):
    missing = []
    for text in strings(path):
        for cited in NOTES.findall(text):
            places = [ROOT / cited, path.parent / cited, ROOT / "distill_core" / cited, ROOT / "nodes" / cited]
            if not any(place.exists() for place in places) and not (cited.endswith(".py") and "/" not in cited):
                missing.append(cited)
    assert not missing, missing


def test_the_number_of_presets_is_told_as_it_is():
    every = presets().values()
    unlisted = sum(preset.grid["kind"] == "unlisted" for preset in every)
    numbers = {"presets": len(every), "with noise levels": len(every) - unlisted, "that say why": unlisted}
    told = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for what, count in numbers.items():
            for number in re.findall(rf"\b(\d+) {what}", text):
                assert int(number) == count, f"{page.relative_to(ROOT)}: {number} {what}, but there are {count}"
                told += 1
    assert told >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_a_head(page):
    """Rows after a blank line have none and render as text."""
    lines, inside, bad = page.read_text(encoding="utf-8").splitlines(), False, []
    code = False
    for number, line in enumerate(lines):
        code ^= line.lstrip().startswith("```")
        row = line.startswith("|") and not code
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if row and not inside and not re.fullmatch(r"\|[\s:|-]+\|?", below):
            bad.append(number + 1)
        inside = row
    assert not bad, bad
