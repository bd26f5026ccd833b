"""What README, docs and help pages point to exists: links, paths in code, modules, workflows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "web" / "docs").glob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
FOLDERS = "distill_core|nodes|configs|tests|tools|docs|workflows|web|locales"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*<>-]*")
MODULE = re.compile(r"-m (distill_core[\w.]*)")
WORKFLOW = re.compile(  # how the names of workflows begin; a file's name, a path or a setting (sample_every) is none
    r"`((?:distil|tune|make|sample|sd|sdxl|sd3\.5|flux1|z_image|qwen_image|image_to_image|inpainting|compare|schedule)_(?!every`)[\w.]+)`"
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> str:
    return "\n".join(CODE.findall(page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The headings of a Markdown file as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(path: str) -> bool:
    """Whether a path of the repository, perhaps with * in it, is there; one with <...> is a pattern for readers."""
    return "<" in path or (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        if re.match(r"https?:|mailto:", target):
            continue
        if not to.exists() or (heading and heading not in anchors(to)):
            broken.append(target)
    assert not broken, broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_code_exist(page):
    paths = {path.rstrip("./") for path in PATH.findall(code_of(page))}
    missing = sorted(path for path in paths if not exists(path))
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_in_commands_exist(page):
    files = {module: ROOT / module.rstrip(".").replace(".", "/") for module in MODULE.findall(code_of(page))}
    missing = [name for name, path in files.items() if not path.is_dir() and not path.with_suffix(".py").is_file()]
    assert not missing, missing


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_workflows_exist(page):
    """The changelog may name workflows by what they were called."""
    names = {name for name in WORKFLOW.findall(page.read_text(encoding="utf-8")) if not name.endswith((".py", ".md"))}
    missing = sorted(name for name in names if not (ROOT / "workflows" / f"{name}.json").is_file())
    assert not missing, missing


def test_the_commands_of_the_readme_are_where_ci_looks_for_them():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for marker in ("<!-- demo command -->", "<!-- test command -->"):
        after = lines[lines.index(marker) + 1 : lines.index(marker) + 3]
        assert sum(line.startswith("python3 ") for line in after) == 1
