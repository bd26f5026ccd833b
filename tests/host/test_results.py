"""Training Report and Save Turbo LoRA in the real server."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import mini_training, node
from PIL import Image
from server import Host, failure_text


@pytest.fixture(scope="module")
def reported(host) -> tuple[Host, dict]:
    """A short run whose report, with a grid, is also made by the trainer itself."""
    graph = mini_training(
        "reported",
        vae=["mini", 1],
        preview_positive=["classes", 0],
        preview_negative=["none", 0],
        preview_every=2,
        target_steps=2,
    )
    graph["report"] = node(
        "TurboDistillReport",
        run_name=["train", 4],
        model=["teacher", 0],
        vae=["mini", 1],
        positive=["classes", 0],
        negative=["none", 0],
        seed=0,
    )
    return host, host.run(graph, 300)["outputs"]


def picture(host: Host, entry: dict) -> np.ndarray:
    data = entry["images"][0]
    return np.asarray(Image.open(host.base_dir / "temp" / data["filename"]).convert("RGB"))


def test_the_report_is_the_trainers_own_and_shows_teacher_and_student(reported):
    """Four rows of ten pictures: the columns' rows differ, since a few steps have already changed the student."""
    host, outputs = reported
    trainer, node_made = picture(host, outputs["train"]), picture(host, outputs["report"])
    assert trainer.shape == node_made.shape and np.array_equal(trainer, node_made)
    cells = trainer[-4 * 132 :].reshape(4, 132, trainer.shape[1], 3)
    for row in cells:
        assert row[:128, 170:].std() > 20, "pictures, not blank paper"
    assert not np.array_equal(cells[0], cells[1]) and not np.array_equal(cells[0], cells[2])


def test_a_run_that_does_not_exist_is_explained(host):
    graph = {"report": node("TurboDistillReport", run_name="never")}
    entry = host.wait(host.queue(graph))
    assert "there is no run 'never'" in failure_text(entry)


def test_a_lora_of_another_trainer_is_not_saved_as_a_turbo_lora(reported, host):
    graph = mini_training("foreign")
    graph["core"] = node(
        "TrainLoraNode",
        model=["mini", 0],
        latents=["zeros", 0],
        positive=["one", 0],
        batch_size=1,
        grad_accumulation_steps=1,
        steps=1,
        learning_rate=1e-4,
        rank=2,
        optimizer="AdamW",
        loss_function="MSE",
        seed=0,
        training_dtype="fp32",
        lora_dtype="fp32",
        quantized_backward=False,
        algorithm="LoRA",
        gradient_checkpointing=False,
        checkpoint_depth=1,
        offloading=False,
        existing_lora="[None]",
        bucket_mode=False,
        bypass_mode=False,
    )
    graph["zeros"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    graph["one"] = node("TurboDistillMiniConditioning", class_name="bag")
    graph["save"]["inputs"]["lora"] = ["core", 0]
    graph = {key: graph[key] for key in ("mini", "zeros", "one", "core", "save")}
    entry = host.wait(host.queue(graph), 120)
    assert "does not say how it was distilled" in failure_text(entry)
