"""Turbo Retention and the trainers' stop rule in the real server, on the mini model and its shipped student."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graphs import OWN, node
from PIL import Image
from run_files import fails, log_of, lora_of
from server import Host
from test_core_datasets import MINI, latents_dataset

from distill_core.lora_files import read_lora


def retention(before: list, after: list, **choice) -> dict:
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "turbo": node("TurboDistillLoadMiniModel", distilled=True),
        "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "retention": node(
            "TurboDistillRetention",
            **dict(before=before, after=after, positive=["classes", 0], latent_image=["latent", 0], noises=2)
            | dict(preset="auto", seed=5, vae=["mini", 1])
            | choice,
        ),
        "score": node("PreviewAny", source=["retention", 1]),
        "report": node("PreviewAny", source=["retention", 2]),
    }


def measured(host: Host, graph: dict) -> tuple[np.ndarray, float, str]:
    outputs = host.run(graph, 300)["outputs"]
    file = host.base_dir / "temp" / outputs["retention"]["images"][0]["filename"]
    score, report = (outputs[name]["text"][0] for name in ("score", "report"))
    return np.asarray(Image.open(file).convert("RGB")), json.loads(score), report


def test_a_turbo_keeps_all_of_itself(host):
    picture, score, report = measured(host, retention(["turbo", 0], ["turbo", 0]))
    assert score == pytest.approx(1, abs=1e-3) and "retention" in report and "few to many" in report
    rows = [picture[26 + 132 * i : 26 + 132 * i + 128, 170:] for i in range(2)]
    assert picture.shape == (26 + 2 * 132, 170 + 10 * 132, 3) and np.abs(rows[0].astype(float) - rows[1]).max() < 3


def test_the_model_without_its_turbo_lora_has_lost_much(host):
    picture, score, _ = measured(host, retention(["turbo", 0], ["mini", 0], vae=["mini", 1]))
    assert 0 < score < 0.75
    assert picture[26:154, 170:].std() > picture[158:286, 170:].std(), "it is blurred at so few steps"


def own_pictures(name: str) -> dict:
    """Eight bags of the mini turbo as a dataset."""
    made = dict(preset="auto", steps=4, denoise=1.0, denoise_mode="snap", seed=9, sampler="of the preset", cfg=0.0)
    return MINI | {
        "turbo": node("TurboDistillLoadMiniModel", distilled=True),
        "bag": node("TurboDistillMiniConditioning", class_name="bag"),
        "eight": node("EmptySD3LatentImage", width=64, height=64, batch_size=8),
        "bags": node("TurboDistillSampler", model=["turbo", 0], positive=["bag", 0], latent_image=["eight", 0], **made),
        **latents_dataset(name, ["bags", 0], ["bag", 0]),
    }


def test_with_own_pictures_it_says_what_was_gained(host):
    """The pictures are the turbo's own, which is near to them."""
    graph = own_pictures("retained") | retention(["turbo", 0], ["mini", 0], dataset=["dataset", 0])
    _, _, report = measured(host, graph)
    figures = {line[:17].strip(): line[17:41] for line in report.splitlines()[1:]}
    assert {"concept before", "concept after", "gain"} <= figures.keys()
    assert abs(float(figures["concept before"].split()[0])) < 0.2 and "nan" not in report


def test_the_stop_rule_ends_a_run_and_the_node_says_why(host):
    """The mini turbo on bags alone, at a rate that it does not survive."""
    trainer = dict(student_lr=2e-2, discriminator_lr=2e-3, rank=4, batch_size=4, target_steps=4, steps=60)
    graph = own_pictures("kept") | {
        "settings": node("TurboDistillTrainingSettings", keep_at_least=0.7, retention_every=3),
        "train": node(
            "TurboDistillLADDTrainer",
            **dict(model=["turbo", 0], dataset=["dataset", 0], run_name="kept", settings=["settings", 0]),
            **(trainer | OWN["LADD"]),
        ),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix="loras/kept"),
    }
    said = host.run(graph, 300)["outputs"]["train"]["text"][0]
    logs = log_of(host, "kept")
    figures = {entry["step"]: entry["retention"] for entry in logs if "retention" in entry}
    last = max(figures)
    assert last == logs[-1]["step"] < 60 and figures[last] < 0.7
    assert f"ended after step {last}" in said and "keep_at_least" in said
    assert read_lora(lora_of(host, "kept"))[1]["steps"] == last - 3
    again = host.run({**graph, "settings": graph["settings"]}, 300)["outputs"]
    assert "train" not in again or f"ended after step {last}" in again["train"]["text"][0]


MISTAKES = {"is for": dict(preset="sdxl-turbo")}


@pytest.mark.parametrize("said", ["is for"])
def test_a_mistake_is_named(host, said):
    assert said in fails(host, retention(["turbo", 0], ["turbo", 0], **MISTAKES[said]))
