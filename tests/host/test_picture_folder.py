"""Picture Folder in the real server: the same dataset as the command's, and what the node says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from graphs import mini_training, node
from PIL import Image
from run_files import log_of
from test_datasets import fails, folder_of

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.models import mini

EXAMPLES = mini.ASSETS.parent / "pictures"
SHIPPED = "example pictures (shipped)"


def picture_folder(name: str, **changes) -> dict:
    """The mini model, its "clip", and the node; None: not connected."""
    settings = dict(
        model=["mini", 0],
        vae=["mini", 1],
        clip=["mini", 2],
        folder=SHIPPED,
        dataset_name=name,
        size=64,
        step=16,
        dtype="float32",
    )
    given = {key: value for key, value in (settings | changes).items() if value is not None}
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "bag": node("TurboDistillMiniConditioning", class_name="bag"),
        "dataset": node("TurboDistillPictureFolder", **given),
    }


def said(outputs: dict) -> str:
    return "".join(outputs["dataset"]["text"])


@pytest.mark.case("host 6", "own pictures with captions come from a folder in one node")
def test_it_makes_the_commands_dataset_and_says_what_it_did(host, tmp_path):
    text = said(host.run(picture_folder("shipped"), 120)["outputs"])
    assert "12 pictures in 3 sizes" in text and "64x64: 9" in text and "left out" not in text
    (tmp_path / "c.toml").write_text("[pictures]\nsize = 64\nstep = 16\n")
    assert main(["cache", str(tmp_path / "c.toml"), "--images", str(EXAMPLES), "--out", str(tmp_path / "data")]) == 0
    made, expected = by_bucket(folder_of(host, "shipped")), by_bucket(tmp_path / "data")
    assert made.keys() == expected.keys() and len(expected) == 3
    for bucket, batch in expected.items():
        torch.testing.assert_close(made[bucket].latents, batch.latents, rtol=0, atol=1e-4)
        assert torch.equal(made[bucket].cond.context, batch.cond.context)
    uncond = LatentDataset(folder_of(host, "shipped")).uncond()
    assert torch.equal(uncond.context, mini.load_conditioning()["context"][10:])
    kept = json.loads((folder_of(host, "shipped") / "pictures.json").read_text())
    assert kept["files"]["coat_2.png"]["caption"] == "coat"


def by_bucket(folder: Path) -> dict:
    dataset = LatentDataset(folder)
    return {bucket: dataset.read(items) for bucket, items in dataset.buckets.items()}


def test_one_conditioning_serves_all(host):
    host.run(picture_folder("one_for_all", clip=None, positive=["bag", 0]), 120)
    bag = mini.load_conditioning()["context"][mini.CLASS_NAMES.index("bag")]
    batches = by_bucket(folder_of(host, "one_for_all")).values()
    assert all(torch.equal(row, bag) for batch in batches for row in batch.cond.context)


@pytest.fixture
def own(host):
    folder = host.base_dir / "input" / "my pictures"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(EXAMPLES, folder)
    return folder


@pytest.mark.case("training 2a", "EXIF, transparency and damaged files are minded, and said on the node")
def test_a_changed_folder_is_seen_and_named(host, own):
    (own / "cut.png").write_bytes((own / "bag_1.png").read_bytes()[:300])
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save(own / "clear.png")
    graph = picture_folder("own", folder="my pictures", caption="coat")
    text = said(host.run(graph, 120)["outputs"])
    assert re.search(r"13 pictures in 3 sizes.*left out: cut.png \(", text, re.S)
    shutil.copy(own / "bag_1.png", own / "added.png")
    text = fails(host, graph)
    assert "holds a dataset made with other settings (1 added (added.png)); choose another dataset_name" in text
    (own / "added.png").unlink()
    graph["dataset"]["inputs"]["background"] = "black"
    assert "background is black now, was white" in fails(host, graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(positive=["bag", 0]), "connect clip, .* or positive, .*: one of them"),
        (dict(clip=None), "connect clip, .* or positive, .*: one of them"),
        (dict(caption="x", folder="my pictures"), "the mini model knows .*; not 'x'"),
        (dict(size=32, step=64), "size 32 is smaller than step 64"),
    ],
)
def test_mistakes_are_explained(host, own, change, message):
    (own / "bag_1.txt").unlink()
    text = fails(host, picture_folder("mistake", **change))
    assert re.search(message, text), text
    assert not (folder_of(host, "mistake") / "dataset.json").exists()


def test_a_picture_dataset_does_not_know_the_models_loras(host):
    host.run(picture_folder("shipped"), 120)
    lora = host.add_model("loras", mini.ASSETS / "student.safetensors", "mini-student.safetensors")
    graph = picture_folder("shipped", model=["other", 0])
    graph["other"] = node("LoraLoaderModelOnly", model=["mini", 0], lora_name=lora, strength_model=0.5)
    host.run(graph, 120)


def test_a_student_is_trained_on_it(host):
    graph = mini_training("on_pictures", steps=3, batch_size=4)
    graph["dataset"] = picture_folder("shipped")["dataset"]
    graph["train"]["inputs"]["pairs_weight"] = 0.0
    host.run(graph, 120)
    assert [entry["step"] for entry in log_of(host, "on_pictures")] == [1, 2, 3]
