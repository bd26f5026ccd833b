"""LADD Trainer on all weights in the real server: what it reaches, every way to the student, cancel and resume."""

from __future__ import annotations

import pytest
import torch
from graphs import class_samples, guided_teacher, mini_training, node, saved_student, student_score, teacher_score
from run_files import fails, log_of, lora_of
from server import Host

from distill_core.lora_files import read_lora

TEACHER = {"count": 512, "steps": 8, "batch_size": 128}
SETTINGS = dict(train="all weights", rank=0, steps=40, batch_size=16, student_lr=1e-4)


def full_training() -> dict:
    return mini_training("full", "one_step", TEACHER, **SETTINGS)


@pytest.fixture(scope="module")
def trained(host) -> Host:
    """The mini model's weights all trained for one step, and saved as a model of its own by core."""
    graph = full_training()
    graph["model"] = node("ModelSave", model=["train", 0], filename_prefix="diffusion_models/full")
    host.run(graph, 600)
    return host


def test_one_step_of_the_student_is_far_better_than_one_of_the_teacher(trained):
    """fd of the saved file, loaded by core's loader and sampled by Turbo Sampler on auto."""
    scores = [student_score(trained, "full_00001_.safetensors"), teacher_score(trained)]
    print("student", scores[0], "teacher", scores[1])
    assert scores[0]["fd"] <= 0.30 * scores[1]["fd"] and scores[0]["accuracy"] > 0.8


def test_every_way_to_the_student_gives_the_same_pictures(trained):
    """The trainer's MODEL, its LORA_MODEL, the file, and the whole model that core saved."""
    graph = full_training()
    del graph["save"]
    by_core = node("LoraModelLoader", model=["teacher", 0], lora=["train", 1], strength_model=1.0, bypass=False)
    levels, _ = guided_teacher()
    whole = levels | {"base": node("UNETLoader", unet_name="full_00001_.safetensors", weight_dtype="default")}
    said = dict(sigmas=["levels", 0], steps=0, sampler="ancestral", cfg=1.0)  # neither carries our metadata
    ways = {
        "file": (saved_student("full_00001_.safetensors"), ["model", 0], {}),
        "model": (graph, ["train", 0], {}),
        "lora": (graph | levels | {"by_core": by_core}, ["by_core", 0], said),
        "whole": (whole, ["base", 0], said),
    }
    before = len(trained.log())
    images = {name: class_samples(trained, *way, 2, **how) for name, (*way, how) in ways.items()}
    for name, latents in images.items():
        assert torch.equal(latents, images["file"]), name
    told = trained.log()[before:]
    assert "lora key not loaded" not in told and "NOT LOADED" not in told


def test_the_file_says_what_it_is(trained):
    state, said = read_lora(lora_of(trained, "full"))
    assert said["weights"] == "differences" and said["config"]["student"]["rank"] == 0 and said["steps"] == 40
    assert said["sigmas"] == [1.0] and said["sampler"] == "ancestral" and said["cfg"] == 1.0
    trained.run(mini_training("lora_beside", "one_step", TEACHER, steps=1), 120)
    assert said["base"] == read_lora(lora_of(trained, "lora_beside"))[1]["base"], "the teacher, not the student"
    assert {name.rsplit(".", 1)[1] for name in state} == {"diff", "diff_b"}
    assert sum(value.numel() for value in state.values()) > 3.5e6
    log = log_of(trained, "full")
    assert sum(entry["pairs"] for entry in log[-5:]) < sum(entry["pairs"] for entry in log[:5])


def test_layers_of_a_lora_are_refused(host):
    text = fails(host, mini_training("full_targets", train="all weights", lora_targets="attn"))
    assert "leave it empty to train all weights, or set train to LoRA" in text
