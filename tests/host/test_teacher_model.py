"""Trainers whose teacher is another MODEL than the one that is distilled (probe_other_teacher.py)."""

from __future__ import annotations

import json

import pytest
from graphs import mini_training, node
from PIL import Image
from run_files import lora_of, run_folder, steps_of
from server import run_probe

from distill_core.lora_files import read_lora

NAMES = {
    "a LoRA": "flux.safetensors with 1 LoRA",
    "another checkpoint": "another checkpoint.safetensors",
    "another size": "another size.safetensors",
}
every = pytest.mark.parametrize("teacher", NAMES)


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("teachers")
    run_probe("probe_other_teacher.py", folder)
    return json.loads((folder / "other_teacher.json").read_text())


@pytest.mark.parametrize("teacher", [*NAMES, "two LoRAs"])
def test_it_answers_as_the_host_samples_it(probe, teacher):
    """On a network of its own, or by its further LoRAs beside the student's."""
    found = probe["steps"][teacher]
    assert found["difference"] < 3e-6 and found["effect"] > 1e-2
    assert found["one network"] == ("LoRA" in teacher)


@every
def test_the_discriminator_reads_its_features(probe, teacher):
    found = probe["steps"][teacher]
    wider = teacher == "another size"
    assert found["channels"] == ([256] * 4 if wider else [128] * 3) and ("double_blocks.1" in found["taps"]) == wider


@every
def test_only_the_student_changes(probe, teacher):
    found = probe["steps"][teacher]
    assert found["frozen"] and found["gradients elsewhere"] == 0 and found["trained"] > 1e-4


@every
@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_the_students_gradient_is_right(probe, teacher, mode):
    """Through the teacher's answer and features, in float64, against five-point finite differences."""
    assert probe["gradients"][f"{teacher} {mode}"] < 1e-3


@every
@pytest.mark.parametrize("method", ["LADD", "DMD2"])
def test_a_run_says_who_has_taught(probe, teacher, method):
    found = probe["runs"][f"{method} {teacher}"]
    assert found["report"] and found["file"] and found["name"] == found["started"] == NAMES[teacher]
    asked = {"LADD": "distillation", "DMD2": "distribution_matching"}[method]
    assert found["steps"] == 2 and found["losses"] == ["adversarial", asked]


def test_a_run_goes_on_with_the_same_teacher_only(probe):
    said = probe["runs"]["another teacher"]
    assert "teacher_model is another one now" in said and "choose another run_name" in said


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("sd15", "teacher_model: sd15.safetensors takes latents of 4 channels, the model 16"),
        ("flux2", "teacher_model: flux2.safetensors takes latents of 128 channels, the model 16"),
        ("other texts", "the teacher other texts.safetensors takes text tokens of width 32, the model text tokens of"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(probe, teacher, said):
    assert said in probe["mistakes"][teacher] and probe["mistakes"][f"{teacher} steps"] == 0


def test_a_teacher_that_cannot_be_copied_is_named(probe):
    assert probe["mistakes"]["bound"].startswith("teacher_model: the model carries what a student cannot be trained")


def test_the_model_itself_is_no_other_teacher(probe):
    """With another shift it is the model, too; LoRAs are another teacher, and so are weights in full."""
    found = probe["the_model_itself"]
    assert found["flux"] and found["shifted"] and not found["differences"] and not found["a LoRA"]


def test_what_is_no_lora_more_has_a_network_of_its_own(probe):
    found = probe["the_model_itself"]
    assert found["differences have a network"] and found["without has a network"] and found["the second alone"]


def test_the_plan_counts_the_second_network(probe):
    plans, weights = probe["plans"], probe["plans"]["weights"]
    assert plans["flux"] == weights["flux"] < plans["a LoRA"] < 1.1 * weights["flux"]
    assert plans["another checkpoint"] == 2 * weights["flux"]
    assert plans["another size"] == weights["flux"] + weights["another size"]


@pytest.mark.parametrize("tier", ["ram", "file"])
def test_both_networks_can_be_offloaded(probe, tier):
    """The student is the same."""
    assert probe["offloaded"][tier] < 1e-7


# In the server


@pytest.fixture(scope="module")
def further(host):
    """The name of a LoRA of the mini model, as LoRA loaders list it."""
    host.run(mini_training("further"), 120)
    return "further_00001_.safetensors"


@pytest.mark.parametrize("method", ["LADD", "ADD", "DMD2", "Diffusion2GAN"])
def test_each_trainer_takes_another_teacher(host, further, method):
    """Here the model with a LoRA. The report's rows of the teacher are its own."""
    name = f"by_another_{method}"
    previews = dict(vae=["mini", 1], preview_positive=["classes", 0], preview_negative=["none", 0])
    graph = mini_training(name, method=method, teacher_model=["more", 0], steps=2, **previews)
    loaded = node("LoraLoaderModelOnly", model=["teacher", 0], lora_name=further, strength_model=1.0)
    host.run(graph | {"more": loaded}, 300)
    assert steps_of(host, name) == [1, 2]
    described = read_lora(lora_of(host, name))[1]
    assert described["teacher"] == "transformer.safetensors with 1 LoRA" and "below" not in described
    with Image.open(run_folder(host, name) / "report.png") as picture:
        assert picture.height > 480
