"""The shipped workflows in the real frontend: no node missing, unconnected or red; those on the mini model run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from browser import BROWSER_FOUND, drive
from server import REPO

from distill_core.models import mini

sys.path.append(str(REPO / "tools"))
from make_workflows import complete  # noqa: E402

from workflows import RUNS_ANYWHERE, WORKFLOWS, add_placeholders  # noqa: E402

ARTEFACTS = Path(os.environ.get("TEST_ARTEFACTS") or REPO / "build" / "artefacts")
TRAINERS = {
    "distil_mini_ladd": "TurboDistillLADDTrainer",
    "distil_mini_add": "TurboDistillADDTrainer",
    "distil_mini_diffusion2gan": "TurboDistillDiffusion2GANTrainer",
}
PICTURES = dict.fromkeys(TRAINERS, 1)  # that a run saves; the others save a batch of four
# The runs of the files are those of tests/benchmarks/distil_in_graph.py; here they are cut to a few steps.
SHORTER = {
    name: {
        "TurboDistillTeacherLatents": {"count": 64, "steps": 4, "batch_size": 64},
        trainer: {"steps": 6, "batch_size": 8, "preview_every": 2},
    }
    for name, trainer in TRAINERS.items()
}
FILES = sorted((REPO / "workflows").glob("*.json"))


def graph_of(name: str) -> dict:
    return json.loads((REPO / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_has_its_file_and_picture(name):
    """The file has the nodes of tools/workflows.py; if not, run tools/make_workflows.py again."""
    types = sorted(node["type"] for node in graph_of(name)["nodes"])
    assert types == sorted(node["class_type"] for node in WORKFLOWS[name].values())
    assert (REPO / "workflows" / f"{name}.jpg").stat().st_size > 10_000


def test_no_file_is_left_over():
    assert [path.stem for path in FILES] == sorted(WORKFLOWS)


def test_the_template_browser_lists_them(host):
    assert sorted(host.get("/workflow_templates")["turbo-distill"]) == sorted(WORKFLOWS)


def widgets_of(node: dict) -> dict:
    """A node's widget values by name; what happens to a seed after a run stands behind it and has no name."""
    values = [value for value in node["widgets_values"] if value not in ("fixed", "randomize")]
    return dict(zip((entry["name"] for entry in node["inputs"] if "widget" in entry), values, strict=True))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_our_nodes_have_the_values_that_were_asked_for(host, name):
    """Those of tools/workflows.py, else the node's own; if not, run tools/make_workflows.py again."""
    asked = {str(i + 1): node for i, node in enumerate(complete(WORKFLOWS[name], host.object_info()).values())}
    for node in graph_of(name)["nodes"]:
        if node["type"].startswith("TurboDistill"):
            inputs = asked[str(node["id"])]["inputs"]
            assert {k: v for k, v in widgets_of(node).items() if inputs[k] != v} == {}


@pytest.fixture(scope="module")
def opened(host) -> dict:
    """What the frontend says of every workflow; the screenshots of the runs stay in build/artefacts."""
    if not BROWSER_FOUND:
        pytest.skip("no Node.js with playwright-core and Chromium: set PLAYWRIGHT_PATH and CHROMIUM")
    add_placeholders(host.base_dir)
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    has_mini = (mini.ASSETS / "transformer.safetensors").is_file()
    jobs = [
        {
            "name": name,
            "graph": graph_of(name),
            "run": has_mini and name in RUNS_ANYWHERE,
            "picture": str(ARTEFACTS / f"{name}.png"),
            "timeout": 300,
            "set": SHORTER.get(name, {}),
            # a picture is taken at the second live preview
            "watch": name in TRAINERS
            and {"type": TRAINERS[name], "previews": 2, "picture": str(ARTEFACTS / f"{name}_training.png")},
        }
        for name in WORKFLOWS
    ]
    return {result["name"]: result for result in drive(host.url, jobs, timeout=1200)}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_frontend_opens_it_without_a_fault(opened, name):
    result = opened[name]
    assert len(result["nodes"]) == len(WORKFLOWS[name]) and result["faults"] == [] and result["errors"] == []


@pytest.mark.parametrize("name", RUNS_ANYWHERE)
def test_it_runs_to_its_picture(opened, host, name):
    if "run" not in opened[name]:
        pytest.skip("the mini model's files are not in distill_core/assets/mini")
    assert opened[name]["run"]["event"] == "execution_success", opened[name]["run"]
    pictures = list((host.base_dir / "output").glob(f"{name}_*.png"))
    assert len(pictures) == PICTURES.get(name, 4)
    assert (ARTEFACTS / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_shows_live_previews(opened, name):
    if "run" not in opened[name]:
        pytest.skip("the mini model's files are not in distill_core/assets/mini")
    assert opened[name]["previews"][TRAINERS[name]] >= 3, "samples at steps 2, 4 and 6"
