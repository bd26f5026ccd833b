"""The shipped workflows in the real frontend: no node missing, unconnected or red; those on the mini model run."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import BROWSER_FOUND, drive
from PIL import Image
from run_files import run_folder
from server import REPO

from distill_core.models import mini

sys.path.append(str(REPO / "tools"))
from make_workflows import complete  # noqa: E402
from mini_workflows import SAVED_BY_DISTIL_MINI_LADD  # noqa: E402
from model_links import LINKS, TINY  # noqa: E402
from workflow_groups import GROUPS, NOTE  # noqa: E402
from workflow_notes import notes  # noqa: E402

from workflows import RUNS_ANYWHERE, WORKFLOWS, add_placeholders, files  # noqa: E402

ARTEFACTS = Path(os.environ.get("TEST_ARTEFACTS") or REPO / "build" / "artefacts")
TRAINERS = {
    "distil_mini_ladd": "TurboDistillLADDTrainer",
    "distil_mini_add": "TurboDistillADDTrainer",
    "distil_mini_diffusion2gan": "TurboDistillDiffusion2GANTrainer",
    "distil_mini_dmd2": "TurboDistillDMD2Trainer",
    "own_pictures": "TurboDistillLADDTrainer",
    "inpaint_scenes": "TurboDistillLADDTrainer",
    "edit_scenes": "TurboDistillLADDTrainer",
    "tune_mini_turbo": "TurboDistillTuneTrainer",
    "make_adapter": "TurboDistillAdapterTrainer",
    "prefer_mini": "TurboDistillDPOTrainer",
}
# that a run saves: the report and four each of teacher and student; before and after; with a map of each pair
PICTURES = dict.fromkeys(TRAINERS, 9) | {
    "edit_scenes": 17,  # the picture, the teacher's and two of the student
    "tune_mini_turbo": 17,  # before and after of two prompts
    "prefer_mini": 17,
    "make_adapter": 13,
    "seed_variety": 8,
    "schedule_doctor": 8,
    "compare_latents": 12,
    "sample_mini": 4,
    "sample_scenes": 4,
    "lora_in_ksampler": 4,
    "compare_teacher_student": 1,
}
OWN_FILES = ("my_sdxl_fine_tune.safetensors", "example.png", SAVED_BY_DISTIL_MINI_LADD)  # that nobody can download
# The runs of the files are those of tests/benchmarks/distil_in_graph.py; here they are cut to a few steps.
SHORTER = {
    name: {
        "TurboDistillTeacherLatents": {"count": 64, "steps": 4, "batch_size": 64},
        "TurboDistillTeacherEdits": {"count": 48, "steps": 4},
        trainer: {"steps": 6, "batch_size": 8, "preview_every": 2},
    }
    for name, trainer in TRAINERS.items()
}
for name in ("tune_mini_turbo", "make_adapter"):
    SHORTER[name][TRAINERS[name]]["keep_count"] = 14
IN_BOTH_DESIGNS = {  # and what makes the second run another than the first
    "sample_mini": {"TurboDistillSampler": {"seed": 8}},
    "distil_mini_ladd": {"TurboDistillLADDTrainer": {"run_name": "nodes_2"}},
}
NODES_2 = " in nodes 2.0"
RUNS = (*RUNS_ANYWHERE, *(name + NODES_2 for name in IN_BOTH_DESIGNS))
FILES = sorted((REPO / "workflows").glob("*.json"))


def graph_of(name: str) -> dict:
    return json.loads((REPO / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_has_its_file_and_picture(name):
    """The file has the nodes of tools/workflows.py; if not, run tools/make_workflows.py again."""
    types = sorted(node["type"] for node in graph_of(name)["nodes"] if node["type"] != NOTE)
    assert types == sorted(node["class_type"] for node in WORKFLOWS[name].values())
    with Image.open(REPO / "workflows" / f"{name}.jpg") as card:
        grey = card.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        assert card.size == (512, 512) and grey > 110, "Templates shows a square; a dark one is not seen there"


@pytest.mark.case("host limitation: notes, titles and groups", "every workflow has a note, groups and titles")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_explains_itself(name):
    """A note that says what to press, change and expect; every node in a group of its own kind; telling titles."""
    graph = graph_of(name)
    (note,) = (node for node in graph["nodes"] if node["type"] == NOTE)
    (text,) = note["widgets_values"]
    assert text == notes(WORKFLOWS)[name], "run tools/make_workflows.py again"
    assert all(f"**What to {what}" in text for what in ("press", "change first", "expect"))
    assert {group["title"] for group in graph["groups"]} <= set(GROUPS) and len(graph["groups"]) >= 4
    boxes = [group["bounding"] for group in graph["groups"]]
    for node in graph["nodes"]:
        x, y = node["pos"]
        assert node is note or sum(left <= x < left + w and top <= y < top + h for left, top, w, h in boxes) == 1
    titles = {node.get("title") for node in graph["nodes"]}
    texts = [n for n in graph["nodes"] if n["type"] in ("CLIPTextEncode", "TurboDistillMiniConditioning")]
    assert any(f"{title}".startswith("positive") for title in titles)
    assert len({node["title"] for node in texts}) == len(texts)
    if name.startswith("distil_"):
        assert {"teacher", "student", "report of the run", "teacher's pictures", "student's pictures"} <= titles
    if name.startswith(("distil_", "tune_")) and name not in TRAINERS:
        assert all(f"**{card} GB card**" in text for card in (12, 16, 24)) and "estimated" in text and "Disk:" in text


@pytest.mark.case("host limitation: model links", "loaders name the address of their file for the panel Missing Models")
def test_every_model_file_has_its_address():
    named = {Path(file).name for file in files()} - set(OWN_FILES)
    tiny = {url.rsplit("/", 1)[1] for urls in TINY.values() for url in urls}
    assert named == set(LINKS) | tiny
    for name in WORKFLOWS:
        for node in graph_of(name)["nodes"]:
            values = [value for value in node.get("widgets_values") or [] if value in LINKS]
            given = {model["name"]: model for model in node["properties"].get("models", [])}
            assert set(values) <= set(given)
            assert all(model["url"].startswith("https://huggingface.co/") for model in given.values())
            assert all(given[value]["directory"] == LINKS[value][0] for value in values)


def test_all_samplers_share_one_fixed_seed():
    for name in (name for name, workflow in WORKFLOWS.items() if "seed" in workflow):
        graph = graph_of(name)
        (seed,) = (node for node in graph["nodes"] if node["type"] == "PrimitiveInt")
        assert seed["widgets_values"] == [7, "fixed"] and len(seed["outputs"][0]["links"]) >= 2


def test_the_mask_of_the_inpainting_workflow_is_not_empty(host):
    """White in the middle, black around it, grey at the soft edge."""
    keys = ("keep", "square", "soft square", "mask")
    prompt = {key: WORKFLOWS["inpainting_4_steps"][key] for key in keys}
    prompt["picture"] = {"class_type": "MaskToImage", "inputs": {"mask": ["mask", 0]}}
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": ["picture", 0], "filename_prefix": "mask"}}
    host.run(prompt)
    with Image.open(next((host.base_dir / "output").glob("mask_*.png"))) as picture:
        grey = picture.convert("L")
    assert (grey.getpixel((512, 512)), grey.getpixel((10, 10))) == (255, 0) and 0 < grey.getpixel((270, 512)) < 255


def test_no_file_is_left_over():
    assert [path.stem for path in FILES] == sorted(WORKFLOWS)


def test_the_template_browser_lists_them(host):
    assert sorted(host.get("/workflow_templates")["turbo-distill"]) == sorted(WORKFLOWS)


def widgets_of(node: dict) -> dict:
    """A node's widget values by name; what happens to a seed after a run stands behind it and has no name."""
    values = [value for value in node.get("widgets_values", []) if value not in ("fixed", "randomize")]
    return dict(zip((entry["name"] for entry in node["inputs"] if "widget" in entry), values, strict=True))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_our_nodes_have_the_values_that_were_asked_for(host, name):
    """Those of tools/workflows.py, else the node's own; if not, run tools/make_workflows.py again."""
    asked = {str(i + 1): node for i, node in enumerate(complete(WORKFLOWS[name], host.object_info()).values())}
    for node in graph_of(name)["nodes"]:
        if node["type"].startswith("TurboDistill"):
            inputs = asked[str(node["id"])]["inputs"]
            linked = [k for k, v in inputs.items() if isinstance(v, list)]
            assert {k: v for k, v in widgets_of(node).items() if inputs[k] != v and k not in linked} == {}


def job(name: str, vue: bool = False) -> dict:
    """Open a workflow, look where its nodes lie, and run it in the classic design, or run it once more in the new."""
    widgets = SHORTER.get(name, {})
    if vue:
        other = IN_BOTH_DESIGNS[name]
        widgets = {node: widgets.get(node, {}) | other.get(node, {}) for node in widgets | other}
    run = f"{name}{NODES_2 if vue else ''}"
    # a picture is taken at the second live preview
    watch = {"type": TRAINERS.get(name), "previews": 2, "picture": str(ARTEFACTS / f"{run}_training.png")}
    return {
        "name": run,
        "graph": graph_of(name),
        "settings": {"Comfy.VueNodes.Enabled": vue},
        "geometry": not vue,
        "refresh": name == "lora_in_ksampler",
        "run": True,
        "picture": str(ARTEFACTS / f"{run}.png"),
        "timeout": 300,
        "set": widgets,
        "watch": name in TRAINERS and watch,
    }


@pytest.fixture(scope="module")
def opened(host) -> dict:
    """What the frontend says of every workflow; the screenshots of the runs stay in build/artefacts."""
    if not BROWSER_FOUND:
        pytest.skip("no Node.js with playwright-core and Chromium: set PLAYWRIGHT_PATH and CHROMIUM")
    add_placeholders(host.base_dir)
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    has_mini = (mini.ASSETS / "transformer.safetensors").is_file()
    jobs = [job(name, vue=True) for name in IN_BOTH_DESIGNS] if has_mini else []
    jobs += [job(name) | {"run": has_mini and name in RUNS_ANYWHERE} for name in WORKFLOWS]  # last: the setting stays
    return {result["name"]: result for result in drive(host.url, jobs, timeout=1800)}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_frontend_opens_it_without_a_fault(opened, name):
    result = opened[name]
    assert len(result["nodes"]) == len(WORKFLOWS[name]) + 1 and result["faults"] == [] and result["errors"] == []


@pytest.mark.case("host D11", "no node overlaps another, no link runs behind a node, in both designs of the nodes")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_nothing_lies_on_top_of_another(opened, name):
    """As drawn: boxes of nodes, lines of links, edges of groups."""
    for design, geometry in opened[name]["geometry"].items():
        assert geometry["nodes"] == len(WORKFLOWS[name]) + 1 and geometry["lines"] >= len(graph_of(name)["links"])
        assert geometry["found"] == [], design


def end_of(opened: dict, host, name: str) -> tuple[dict, dict]:
    """What the page said of a run, and {node id: its pictures} by the server's history."""
    if "run" not in opened.get(name, {}):
        pytest.skip("the mini model's files are not in distill_core/assets/mini")
    result = opened[name]
    assert result["run"]["event"] == "execution_success", result["run"]
    prompt = result["run"]["detail"]["prompt_id"]
    outputs = host.get(f"/history/{prompt}")[prompt]["outputs"]
    return result, {node: output["images"] for node, output in outputs.items() if output.get("images")}


@pytest.mark.parametrize("name", RUNS)
def test_pressing_run_ends_in_its_pictures(opened, host, name):
    """By the page's button; two also in the new design of the nodes."""
    _, pictures = end_of(opened, host, name)
    saved = [picture for found in pictures.values() for picture in found if picture["type"] == "output"]
    assert len(saved) == PICTURES[name.removesuffix(NODES_2)]
    assert all((host.base_dir / "output" / p["subfolder"] / p["filename"]).is_file() for p in saved)
    assert (ARTEFACTS / f"{name}.png").stat().st_size > 10_000


TRAINED = [name for name in RUNS if name.removesuffix(NODES_2) in TRAINERS]


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_shows_live_previews(opened, host, name):
    result, _ = end_of(opened, host, name)
    assert result["previews"][TRAINERS[name.removesuffix(NODES_2)]] >= 3, "samples at steps 2, 4 and 6"


@pytest.mark.case("host D4", "when a run has ended, the trainer's node on the page shows its report")
@pytest.mark.parametrize("name", TRAINED)
def test_the_last_picture_on_the_trainer_is_its_report(opened, host, name):
    """Read from the page: the run's report.png, but for the host's JPEG; not the curves and samples before it, which
    are 1024 wide. The new design shows it twice. The history has it as a file."""
    result, pictures = end_of(opened, host, name)
    workflow = name.removesuffix(NODES_2)
    (trainer,) = (node for node in graph_of(workflow)["nodes"] if node["type"] == TRAINERS[workflow])
    run = (
        IN_BOTH_DESIGNS[workflow][trainer["type"]]["run_name"] if name != workflow else widgets_of(trainer)["run_name"]
    )
    report = pixels(run_folder(host, run) / "report.png")
    assert max(report.shape) > 1024
    (kept,) = pictures[str(trainer["id"])]
    assert np.array_equal(pixels(io.BytesIO(host.get(f"/view?{urlencode(kept)}"))), report)
    assert result["shown"]
    for shown in result["shown"]:
        seen = pixels(io.BytesIO(base64.b64decode(shown)))
        assert seen.shape == report.shape and np.abs(seen - report).mean() < 2, "of 255"


def pixels(file) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)
