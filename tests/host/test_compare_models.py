"""Compare Models in the real server, on the mini model and its shipped student."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graphs import node
from PIL import Image
from run_files import fails
from server import Host, run_probe

LABEL, TOP = 170, 26  # pixels of the grid beside and above its pictures
PERCEPTUAL = dict(weights="mini model (shipped)", transforms="bg", draws=2, l1=0.0)


def comparison(**choice) -> dict:
    settings = dict(steps="1, 4", teacher_steps=8, teacher_cfg=1.5, preset="auto", seed=5) | choice
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "turbo": node("TurboDistillLoadMiniModel", distilled=True),
        "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
        "one": node("TurboDistillMiniConditioning", class_name="bag"),
        "none": node("TurboDistillMiniConditioning", class_name="none"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "three": node("EmptySD3LatentImage", width=64, height=64, batch_size=3),
        "perceptual": node("TurboDistillLoadPerceptual", **PERCEPTUAL),
        "compare": node(
            "TurboDistillCompare",
            **dict(teacher=["mini", 0], student=["turbo", 0], vae=["mini", 1], positive=["classes", 0])
            | dict(latent_image=["latent", 0], negative=["none", 0])
            | settings,
        ),
        "report": node("PreviewAny", source=["compare", 1]),
    }


def grid_and_report(host: Host, graph: dict) -> tuple[np.ndarray, dict]:
    outputs = host.run(graph, 300)["outputs"]
    file = host.base_dir / "temp" / outputs["compare"]["images"][0]["filename"]
    return np.asarray(Image.open(file).convert("RGB")), json.loads(outputs["report"]["text"][0])


@pytest.fixture(scope="module")
def compared(host) -> tuple[np.ndarray, dict]:
    return grid_and_report(host, comparison(perceptual=["perceptual", 0]))


def test_the_rows_are_those_that_were_asked_for_with_their_costs(compared):
    _, report = compared
    rows = report["rows"]
    assert [(row["model"], row["steps"], row["forwards"]) for row in rows] == [
        ("teacher", 8, 16),
        ("teacher", 1, 2),
        ("teacher", 4, 8),
        ("student", 1, 1),
        ("student", 4, 4),
    ]
    assert rows[3]["sigmas"] == [1.0, 0.0] and rows[4]["sigmas"] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rows[0]["difference"] == 0 and rows[0]["e_latent_lpips"] == pytest.approx(0, abs=1e-6)
    assert all(row["seconds"] > 0 for row in rows) and rows[3]["times_faster"] > 2


def test_more_teacher_steps_come_closer_and_the_student_is_closer_at_one(compared):
    """Both by pixels and by E-LatentLPIPS."""
    rows = {(row["model"], row["steps"]): row for row in compared[1]["rows"]}
    for figure in ("difference", "e_latent_lpips"):
        assert rows["teacher", 4][figure] < rows["teacher", 1][figure]
        assert rows["student", 1][figure] < rows["teacher", 1][figure]


def test_the_grid_has_pictures_and_maps_of_their_differences(compared):
    """Nine lines of ten: the usual teacher, and four rows each with its map, which is brighter where more differs."""
    grid, report = compared
    assert grid.shape[:2] == (TOP + 9 * 132, LABEL + 10 * 132)
    lines = [grid[TOP + i * 132 : TOP + i * 132 + 128, LABEL:] for i in range(9)]
    assert all(line.std() > 20 for line in lines)
    brightness = [lines[i].mean() for i in (2, 4, 6, 8)]
    far = [row["difference"] for row in report["rows"][1:]]
    assert np.argsort(brightness).tolist() == np.argsort(far).tolist()


def test_a_column_is_what_turbo_sampler_makes_of_that_noise(host):
    """The student's row, one prompt and a batch of three, against Turbo Sampler's batch."""
    graph = comparison(positive=["one", 0], latent_image=["three", 0], steps="4")
    sampler = dict(preset="auto", steps=4, denoise=1.0, denoise_mode="snap", seed=5, sampler="of the preset", cfg=0.0)
    graph["sampler"] = node(
        "TurboDistillSampler", model=["turbo", 0], positive=["one", 0], latent_image=["three", 0], **sampler
    )
    graph["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["mini", 1])
    graph["save"] = node("PreviewImage", images=["decode", 0])
    outputs = host.run(graph, 120)["outputs"]
    (grid_file,) = outputs["compare"]["images"]
    grid = np.asarray(Image.open(host.base_dir / "temp" / grid_file["filename"]).convert("RGB")).astype(float)
    for column, file in enumerate(outputs["save"]["images"]):
        wanted = Image.open(host.base_dir / "temp" / file["filename"]).convert("RGB").resize((320, 320), 3)
        x, y = LABEL + column * 324, TOP + 3 * 324
        cell = grid[y : y + 320, x : x + 320]
        assert np.abs(cell - np.asarray(wanted)).mean() < 2


MISTAKES = {
    "steps: 'few' is not a list": dict(steps="few"),
    "steps: '' is not a list": dict(steps=""),
    "there are 10 prompts and 3 latents": dict(latent_image=["three", 0]),
    "needs a negative conditioning": dict(negative=None),
    "steps must be 1-4": dict(steps="7"),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_named(host, said):
    graph = comparison(**MISTAKES[said])
    graph["compare"]["inputs"] = {k: v for k, v in graph["compare"]["inputs"].items() if v is not None}
    assert said in fails(host, graph)


def test_what_does_not_fit_is_said_before_the_first_row(tmp_path):
    run_probe("probe_compare.py", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.pop("sampled") == 0
    wanted = {
        "other latents": "latents of shapes (16, 8, 8) and (4, 8, 8)",
        "no vae": "vae is empty",
        "student's cfg": "cfg 3 needs a negative conditioning",
        "perceptual": "for latents of 4 channels, but these models' have 16",
    }
    assert [name for name, words in wanted.items() if words not in found[name]] == [], found
