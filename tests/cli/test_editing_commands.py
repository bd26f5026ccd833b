"""Editing from the command line: pairs of pictures, a teacher that edits them at drawn strengths, a student of it."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import instruct_pix2pix, sd3_editing, sdxl_editing

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.samplers import sample
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.models.denoiser import Denoiser
from distill_core.models.guidance import GuidedTwice
from distill_core.models.pipelines import ModelConfig, open_source

CONFIG = """
[model]
path = '{folder}/model'
lora_rank = 2
[pictures]
size = 16
step = 16
batch_size = 4
sources = '{folder}/before'
[cache]
count = 6
steps = 3
batch_size = 4
text_strength = [3.0, 10.0]
image_strength = [1.0, 2.2]
[ladd]
warmup_steps = 0
[train]
batch_size = 2
steps = 2
warmup_steps = 1
[discriminator]
width = 8
"""


@pytest.fixture(scope="module", params=[instruct_pix2pix, sdxl_editing, sd3_editing], ids=lambda build: build.__name__)
def folder(request, tmp_path_factory):
    """A tiny pipeline that edits, five pairs of pictures with captions, and a configuration."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        request.param().save_pretrained(folder / "model")
    rng = numpy.random.default_rng(0)
    for name in ("before", "after"):
        (folder / name).mkdir()
        for number in range(5):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text("make it red")
    (folder / "c.toml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    command = ["cache", f"{folder}/c.toml", "--images", f"{folder}/after", "--out", f"{folder}/pairs"]
    assert main(command) == 0
    return folder / "pairs"


@pytest.fixture(scope="module")
def edits(folder, pairs):
    assert main(["cache", f"{folder}/c.toml", "--data", str(pairs), "--out", f"{folder}/edits"]) == 0
    return folder / "edits"


def test_a_pair_is_an_item_with_its_source(folder, pairs):
    dataset, source = LatentDataset(pairs), open_source(ModelConfig(path=f"{folder}/model"))
    items = dataset.read(dataset.largest)

    def encoded(name):
        pixels = numpy.asarray(Image.open(folder / name / "3.png")).copy()
        return source.encode_images(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]

    torch.testing.assert_close(items.latents[3], encoded("after"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(items.cond.extra["source_image"][3], encoded("before"), rtol=1e-4, atol=1e-4)


def test_the_teacher_edits_each_item_at_its_own_strengths(folder, pairs, edits):
    """Six edits of five pairs: the sixth is of the first pair again, with other noise and other strengths."""
    made, given = LatentDataset(edits), LatentDataset(pairs)
    items, sources = made.read(made.largest), given.read(given.largest)
    text, image = items.cond.extra["text_strength"], items.cond.extra["image_strength"]
    assert len(items.latents) == 6 and len(set(text.tolist())) == 6
    assert text.min() >= 3 and text.max() <= 10 and image.min() >= 1 and image.max() <= 2.2
    assert torch.equal(items.cond.extra["source_image"][5], sources.cond.extra["source_image"][0])
    backend = open_source(ModelConfig(path=f"{folder}/model")).backend
    teacher, process = GuidedTwice(Denoiser(backend), made.uncond(), 5.0), backend.process
    options = dict(seed=0, items=[5], sampler="euler")
    again = sample(teacher, process, grid_sigmas(process, 3), items.cond[[5]], items.latents.shape[1:], **options)
    torch.testing.assert_close(again, items.latents[5:], rtol=1e-3, atol=1e-3)


def test_samples_are_at_the_strengths_that_are_asked_for(folder, edits, tmp_path):
    command = ["sample", f"{folder}/c.toml", "--data", str(edits), "--steps", "3", "--count", "2"]
    for name, more in (
        ("own", []),
        ("none", ["--text-strength", "1", "--image-strength", "1"]),
        ("text", ["--text-strength", "9"]),
    ):
        assert main([*command, "--out", str(tmp_path / name), *more]) == 0
    made, source = LatentDataset(edits), open_source(ModelConfig(path=f"{folder}/model"))
    batch, process = made.read(made.largest[:1]), source.backend.process

    def expected(**strengths):
        cond = batch.cond.with_items({name: torch.tensor([value]) for name, value in strengths.items()})
        model = GuidedTwice(Denoiser(source.backend), made.uncond(), 5.0)
        options = dict(seed=0, items=[0], sampler="euler")
        latent = sample(model, process, grid_sigmas(process, 3), cond, batch.latents.shape[1:], **options)
        return ((source.decode(latent)[0] + 1) * 127.5).permute(1, 2, 0).numpy()

    for name, wanted in (
        ("own", expected()),
        ("none", expected(text_strength=1.0, image_strength=1.0)),
        ("text", expected(text_strength=9.0)),
    ):
        drawn = numpy.asarray(Image.open(tmp_path / name / "00000.png")).astype(float)
        assert abs(drawn - wanted).max() <= 1


def test_edits_train_a_student(folder, edits):
    command = ["train", f"{folder}/c.toml", "--data", str(edits), "--out", f"{folder}/run", "--no-preflight"]
    assert main(command) == 0 and (folder / "run" / "student.safetensors").exists()


def test_what_does_not_fit_is_refused_in_words(folder, pairs, edits, tmp_path, capsys):
    def said(*command) -> str:
        assert main([*map(str, command)]) == 2
        return capsys.readouterr().err

    config = folder / "c.toml"
    both = ["--images", folder / "after", "--data", pairs]
    assert "give one of them" in said("cache", config, *both, "--out", tmp_path / "a")
    assert "[cache] text_strength is [3.0, 9.0] now" in said(
        "cache", changed(folder, tmp_path, "[3.0, 10.0]", "[3.0, 9.0]"), "--data", pairs, "--out", edits
    )
    other = changed(folder, tmp_path, f"{folder}/before", f"{folder}/nowhere")
    assert "[pictures] sources: " in said("cache", other, "--images", folder / "after", "--out", tmp_path / "b")
    command = ["sample", config, "--data", edits, "--out", tmp_path / "c"]
    assert "--text-strength must be at least 0 and at most 100, not -2" in said(*command, "--text-strength", -2)
    assert "--image-strength must be at least 0 and at most 100, not nan" in said(*command, "--image-strength", "nan")
    mini = tmp_path / "mini.toml"
    mini.write_text("[cache]\nsizes = [[8, 8]]\ntext_strength = [2.0]\n")
    assert "of a model that edits a picture" in said("cache", mini, "--out", tmp_path / "d")
    assert "of a model that edits a picture" in said("sample", mini, "--text-strength", 2, "--out", tmp_path / "e")


def changed(folder, tmp_path, old: str, new: str):
    path = tmp_path / "changed.toml"
    path.write_text((folder / "c.toml").read_text().replace(old, new))
    return path


def test_pictures_without_a_source_of_their_size_are_left_out(folder, tmp_path, capsys):
    before = tmp_path / "before"
    before.mkdir()
    for number, side in ((0, 16), (1, 24)):
        Image.new("RGB", (side, side)).save(before / f"{number}.png")
    other = changed(folder, tmp_path, f"{folder}/before", str(before))
    assert main(["cache", str(other), "--images", f"{folder}/after", "--out", str(tmp_path / "out")]) == 0
    files = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert list(files["files"]) == ["0.png"] and files["left_out"]["1.png"] == "is 16 x 16 and its source 24 x 24"
    assert files["left_out"]["2.png"] == "has no source of that name"
    Image.new("RGB", (16, 16), "red").save(before / "0.png")
    assert main(["cache", str(other), "--images", f"{folder}/after", "--out", str(tmp_path / "out")]) == 2
    assert "1 with another source (0.png)" in capsys.readouterr().err
