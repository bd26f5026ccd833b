"""A few pictures of any sizes in the real server: they train to the end, and a run that ends early says so."""

from __future__ import annotations

import pytest
from graphs import OWN, node
from run_files import fails, log_of, lora_of, steps_of
from test_core_datasets import MINI, latents_dataset

from distill_core.lora_files import read_lora

SIZES = {"one": (64, 64, 2), "two": (48, 64, 2), "three": (64, 48, 1), "four": (64, 80, 1), "five": (80, 64, 1)}


def few(name: str, sizes: dict, method: str, empty: bool = False, settings: dict | None = None, **trainer) -> dict:
    """Pictures that the mini student makes, width and height and how many of each, into a dataset and a trainer."""
    graph = MINI | {
        "student": node("TurboDistillLoadMiniModel", distilled=True),
        "bag": node("TurboDistillMiniConditioning", class_name="bag"),
    }
    for seed, (key, (width, height, count)) in enumerate(sizes.items()):
        graph[f"empty {key}"] = node("EmptySD3LatentImage", width=width, height=height, batch_size=count)
        graph[key] = node(
            "TurboDistillSampler",
            model=["student", 0],
            positive=["bag", 0],
            latent_image=[f"empty {key}", 0],
            preset="auto",
            steps=4,
            denoise=1.0,
            denoise_mode="snap",
            seed=seed,
            sampler="of the preset",
            cfg=0.0,
        )
    kept = [f"empty {key}" if empty else key for key in sizes]
    graph["latents"] = node("CreateList", **{f"inputs.input{i}": [key, 0] for i, key in enumerate(kept)})
    graph |= latents_dataset(name, ["latents", 0], ["bag", 0])
    rates = dict(student_lr=3e-4, discriminator_lr=2e-3, rank=4, batch_size=2, target_steps=4)
    wired = dict(model=["teacher", 0], dataset=["dataset", 0], run_name=name)
    graph["train"] = node(f"TurboDistill{method}Trainer", **wired, **(rates | OWN[method] | trainer))
    if settings:
        graph["settings"] = node("TurboDistillTrainingSettings", **settings)
        graph["train"]["inputs"]["settings"] = ["settings", 0]
    return graph | {"save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{name}")}


@pytest.mark.case("training 1", "7 pictures in 5 sizes, batch 2, LADD 150 steps: trains to the end")
@pytest.mark.case("training D1", "7 pictures in 5 sizes, batch 2: no step has a diversity of repeats")
def test_seven_pictures_in_five_sizes_train_to_the_end(host):
    host.run(few("seven", SIZES, "LADD", steps=150), 600)
    assert steps_of(host, "seven") == list(range(1, 151))
    assert read_lora(lora_of(host, "seven"))[1]["steps"] == 150
    logs = log_of(host, "seven")
    assert {"diversity" in entry for entry in logs} == {True, False}, "some sizes have one picture"
    assert all(entry.get("diversity", 1.0) < 20 for entry in logs)
    assert not {entry["health"] for entry in logs} & {"collapsed"}


@pytest.mark.case("training 16", "fewer items than the batch train")
@pytest.mark.case("training 2", "3 pictures of one size train")
@pytest.mark.parametrize("method", ["LADD", "ADD"])
@pytest.mark.parametrize("count", [1, 3])
def test_one_and_three_pictures_train(host, method, count):
    name = f"{method}_{count}"
    host.run(few(name, {"one": (64, 64, count)}, method, steps=25), 300)
    assert steps_of(host, name) == list(range(1, 26))
    assert all("diversity" not in entry for entry in log_of(host, name)) == (count == 1)


@pytest.mark.case("training 17", "a learning rate of 1: the node says what happened and what to change")
def test_a_lost_run_says_on_its_node_what_to_change(host):
    """All weights at rate 1: each step moves every weight by about 1, and sooner or later a product of a few layers
    overflows; when depends on the machine."""
    said = fails(host, few("lost", {"one": (64, 64, 3)}, "LADD", steps=600, student_lr=1.0, train="all weights"))
    assert "is not finite at step" in said and "Lower student_lr or discriminator_lr" in said
    steps = steps_of(host, "lost")
    assert len(steps) < 600 and steps == list(range(1, len(steps) + 1)), "the log ends where the run does"
    assert read_lora(lora_of(host, "lost"))[1]["steps"] == len(steps), "and so does what is kept"


@pytest.mark.case("training L4", "the node says that pictures are empty, and that Training Settings can skip the check")
def test_preflight_names_empty_pictures_and_can_be_skipped(host):
    said = fails(host, few("empty", {"one": (64, 64, 3)}, "LADD", empty=True, steps=2))
    assert "almost of one tone" in said and "Training Settings" in said
    host.run(few("empty2", {"one": (64, 64, 3)}, "LADD", empty=True, steps=2, settings={"preflight": False}), 120)
    assert steps_of(host, "empty2") == [1, 2]
