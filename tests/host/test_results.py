"""Training Report and Save Turbo LoRA in the real server."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from graphs import mini_dataset, mini_training, node
from PIL import Image
from run_files import run_folder
from server import Host, failure_text, run_probe


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
    """Five rows of ten pictures: the teacher at 1, 2 and 4 steps, as many as it took for the dataset, and the student
    at 1 and 2. They differ, since a few steps have already changed the student."""
    host, outputs = reported
    trainer, node_made = picture(host, outputs["train"]), picture(host, outputs["report"])
    assert trainer.shape == node_made.shape and np.array_equal(trainer, node_made)
    cells = trainer[-5 * 132 :].reshape(5, 132, trainer.shape[1], 3)[:, :, 170:]
    for row in cells:
        assert row[:128].std() > 20, "pictures, not blank paper"
    for one, other in ((0, 1), (0, 3), (1, 2), (1, 4)):
        assert not np.array_equal(cells[one], cells[other])
    assert not trainer[-5 * 132 :][:, :170].min() > 200, "labels"


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


@pytest.mark.case("host D4", "the trainer's last picture is its report; the report's own sampling shows no latents")
def test_the_last_picture_is_the_report(host, tmp_path):
    """With latent previews on, as most people have them: Teacher Latents shows its latents, the trainer only curves and
    samples, and at last the report in its full size."""
    graph = mini_training(
        "last_picture",
        "last_picture",
        vae=["mini", 1],
        preview_positive=["classes", 0],
        preview_negative=["none", 0],
        preview_every=2,
    )
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    seen = json.loads(run_probe("probe_previews.py", host.url, tmp_path / "graph.json"))
    assert seen["end"] == "execution_success"
    sizes = {node: [size for name, *size in seen["pictures"] if name == node] for node in graph}
    assert sizes["dataset"], "previews are on"
    with Image.open(run_folder(host, "last_picture") / "report.png") as report:
        assert sizes["train"][-1] == list(report.size)
    assert all(max(size) == 1024 for size in sizes["train"][:-1]), "curves with samples, not latents of 8 x 8"


@pytest.mark.case("host console", "a run folder with samples over time, and one page that shows the whole run")
def test_a_run_leaves_samples_over_time_and_one_page(host):
    graph = mini_training("paged", vae=["mini", 1], preview_positive=["classes", 0], preview_every=2, steps=5)
    (said,) = host.run(graph, 120)["outputs"]["train"]["text"]
    folder = run_folder(host, "paged")
    names = [path.name for path in sorted((folder / "samples").iterdir())]
    assert names == ["step000002.jpg", "step000004.jpg", "step000005.jpg"]
    html = (folder / "run.html").read_text()
    assert f"the whole run on one page: {folder / 'run.html'}" in said
    assert html.count("data:image/jpeg") == 3 and html.count("data:image/png") == 2, "curves and the report"
    assert "the student is trained at 1, for the sampler ancestral" in html and "<td>student_lr</td>" in html
    for name in names:
        pixels = np.asarray(Image.open(folder / "samples" / name).convert("RGB"))
        assert pixels[:128, 170:].std() > 20, "pictures, not blank paper"


@pytest.mark.case("host console", "Teacher Latents says in the console and on the node how far it is, with a picture")
def test_teacher_latents_say_how_far_they_are(host, tmp_path):
    graph, before = mini_dataset("spoken", count=64, batch_size=16), len(host.log())
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    seen = json.loads(run_probe("probe_previews.py", host.url, tmp_path / "graph.json"))
    texts = [text for node, text in seen["texts"] if node == "dataset"]
    assert any(re.fullmatch(r"latents: 64 of 64, \S+ s each, 0:00:00 left", text) for text in texts), texts
    assert "the dataset is in" in texts[-1]
    assert re.search(r"teacher latents spoken: 64 of 64, \S+ s each, 0:00:00 left", host.log()[before:])
    rows = [size for node, *size in seen["pictures"] if node == "dataset" and size == [640, 160]]
    assert len(rows) == 4, "a row of four for each batch"


@pytest.mark.case(
    "host limitation: memory of the report", "pictures are sampled in pieces that fit, with the same result"
)
def test_what_memory_does_not_hold_together_is_sampled_in_pieces(tmp_path):
    """Five prompts where two fit: halves until they do. Prompts of another length are apart in any case."""
    run_probe("probe_pieces.py", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["difference"] == 0 and found["same"] == 0
    assert found["sizes"] == [5, 2, 2, 1, 1, 2, 1]
    assert found["runs"] == [[0, 1], [1, 3], [3, 4]] and found["rows"] == 4
