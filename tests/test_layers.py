"""Who may import whom: the folders of ``distill_core`` in reading order, and ComfyUI in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    *(
        "settings",
        "changes",
        "errors",
        "files",
        "digests",
        "lora_files",
        "devices",
        "diffusion",
        "models",
        "data",
        "presets",
        "perceptual",
        "discriminators",
        "methods",
    ),
    *("training", "evaluation", "experiments", "cli", "__main__"),
]
HOST = {"comfy", "comfy_extras", "folder_paths", "latent_preview", "execution", "server", "nodes"}
CORE = sorted((ROOT / "distill_core").rglob("*.py"))
NODES = [path for path in (ROOT / "nodes").rglob("*.py") if (ROOT / "nodes" / "host") not in path.parents]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, also inside functions; ``from x import y`` as x.y."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


@pytest.mark.parametrize(
    "path", [p for p in CORE if len(p.relative_to(ROOT).parts) > 2 or p.stem in LAYERS], ids=name_of
)
def test_a_folder_imports_only_folders_above_it(path):
    own = LAYERS.index(path.relative_to(ROOT / "distill_core").parts[0].removesuffix(".py"))
    inside = [name.split(".")[1] for name in imports(path) if name.startswith("distill_core.")]
    assert [name for name in inside if name in LAYERS and LAYERS.index(name) > own] == []
    assert set(inside) <= {*LAYERS, "__version__"}


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_knows_nothing_of_the_host(path):
    assert {name.split(".")[0] for name in imports(path)} & HOST == set()


@pytest.mark.parametrize("path", NODES, ids=name_of)
def test_only_nodes_host_imports_the_host(path):
    """``comfy_api``, the declared interface of nodes, may be imported everywhere."""
    assert {name.split(".")[0] for name in imports(path) if not name.startswith("nodes.")} & HOST == set()
