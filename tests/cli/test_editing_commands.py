"""Editing from the command line: pairs of pictures, a teacher that edits them at drawn strengths, a student of it."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import instruct_pix2pix, sd3_editing, sdxl_editing

from distill_core.cli.main import main
from distill_core.cli.sample import open_student
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.samplers import sample
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.files import load_tensors
from distill_core.lora_files import read_lora, save_lora
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


def told(folder, tmp_path, name: str = "told", more: str = "", steps: int = 2, text: float = 7.5):
    """A configuration whose student is told the strengths."""
    path = tmp_path / f"{name}.toml"
    wanted = (folder / "c.toml").read_text().replace("steps = 2\n", f"steps = {steps}\nstudent_lr = 0.01\n")
    path.write_text(f"{more}\n{wanted}\n[strengths]\ntold = true\nwidth = 8\ntext = {text}\n")
    return path


def train(config, data, out) -> int:
    return main(["train", str(config), "--data", str(data), "--out", str(out), "--no-preflight"])


def test_a_student_that_is_told_resumes_bit_for_bit(folder, edits, tmp_path):
    assert train(told(folder, tmp_path, steps=4), edits, tmp_path / "once") == 0
    for steps in (2, 4):
        assert train(told(folder, tmp_path, steps=steps), edits, tmp_path / "twice") == 0
    once, twice = (read_lora(tmp_path / name / "student.safetensors") for name in ("once", "twice"))
    assert once[0].keys() == twice[0].keys() and all(torch.equal(once[0][k], twice[0][k]) for k in once[0])
    assert once[0]["lora_strengths.out.weight"].any()
    checkpoint = load_tensors(tmp_path / "once" / "checkpoint.safetensors")[0]
    assert {"ema.strengths.out.weight", "generator.strengths.out.weight"} <= checkpoint.keys()
    assert "discriminator.strengths.weight" in checkpoint
    data = LatentDataset(edits)
    values = data.read(data.largest).cond.extra["text_strength"]
    assert 3 < values.min() < values.max() < 10 and data.span("text_strength") == (3, 10), "what they were drawn from"
    assert once[1]["strengths"]["text_strength"] == [3, 7.5, 10]
    assert train(told(folder, tmp_path, steps=4, text=7.0), edits, tmp_path / "once") == 2


def test_a_told_student_is_turned_by_the_command_and_loads_elsewhere(folder, edits, tmp_path, capsys):
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    assert train(told(folder, tmp_path), edits, tmp_path / "run") == 0
    state, description = read_lora(tmp_path / "run" / "student.safetensors")
    g = torch.Generator().manual_seed(0)
    size = {k: 1.0 if k.startswith("lora_strengths") else 0.1 for k in state}  # two steps change next to nothing
    strong = {k: v + size[k] * torch.randn(v.shape, generator=g) for k, v in state.items()}
    save_lora(tmp_path / "strong.safetensors", strong, description)
    plain = {k: v for k, v in strong.items() if not k.startswith("lora_strengths.")}
    save_lora(tmp_path / "plain.safetensors", plain, {k: v for k, v in description.items() if k != "strengths"})

    def drawn(lora: str, *more) -> numpy.ndarray:
        command = [
            "sample",
            folder / "c.toml",
            "--data",
            edits,
            "--lora",
            tmp_path / f"{lora}.safetensors",
            "--count",
            2,
        ]
        assert main([*map(str, [*command, "--out", tmp_path / "drawn", *more])]) == 0
        return numpy.stack(
            [numpy.asarray(Image.open(tmp_path / "drawn" / f"0000{i}.png")).astype(float) for i in (0, 1)]
        )

    default, low = drawn("strong"), description["strengths"]["text_strength"][0] + 1e-4
    assert (default == drawn("plain")).all()  # who does not know of it has the student at the default strengths
    assert (default == drawn("strong", "--text-strength", 7.5, "--image-strength", 1.5)).all()
    assert abs(default - drawn("strong", "--text-strength", low)).max() > 1
    for lora, asked, words in (
        ("strong", ["--text-strength", "99"], "--text-strength must be from"),
        ("strong", ["--image-strength", "0.5"], "--image-strength must be from"),
        ("plain", ["--text-strength", "5"], "is a student that is told no strengths"),
    ):
        command = ["sample", f"{folder}/c.toml", "--data", str(edits), "--lora", f"{tmp_path}/{lora}.safetensors"]
        assert main([*command, "--out", str(tmp_path / "x"), *asked]) == 2 and words in capsys.readouterr().err
    index = json.loads((folder / "model" / "model_index.json").read_text())
    absent = [name for name, part in index.items() if isinstance(part, list) and part[0] is None]
    loaded = []
    for tensors in (strong, plain):
        save_file(tensors, tmp_path / "elsewhere.safetensors")
        pipeline = DiffusionPipeline.from_pretrained(folder / "model", **dict.fromkeys(absent))
        pipeline.load_lora_weights(tmp_path / "elsewhere.safetensors")
        network = getattr(pipeline, "unet", None) or pipeline.transformer
        loaded.append({k: v for k, v in network.state_dict().items() if "lora" in k})
    assert loaded[0] and all(torch.equal(loaded[0][k], loaded[1][k]) for k in loaded[1])


def test_a_student_goes_on_from_one_that_was_told(folder, edits, tmp_path, capsys):
    assert train(told(folder, tmp_path), edits, tmp_path / "first") == 0
    first = tmp_path / "first" / "student.safetensors"
    start = f"[lora]\nstart_from = '{first}'"

    def after(**changes) -> tuple[int, str]:
        path = told(folder, tmp_path, **changes)
        path.write_text(f"{path.read_text()}{start}\n".replace("student_lr = 0.01", "student_lr = 1e-9"))
        return train(path, edits, tmp_path / "second"), capsys.readouterr().err

    assert after()[0] == 0
    old, new = (read_lora(tmp_path / name / "student.safetensors")[0] for name in ("first", "second"))
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=1e-4, atol=1e-6)
    code, said = after(text=7.0)
    assert code == 2 and "was trained around other strengths, (7.5, 1.5): set [strengths] text and image" in said


@pytest.mark.parametrize("more", ["method = 'dmd2'", ""], ids=["dmd2", "all_weights"])
def test_other_methods_and_students_are_told_too(folder, edits, tmp_path, more):
    path = told(folder, tmp_path, more=more)
    if not more:
        path.write_text(path.read_text().replace("lora_rank = 2", "lora_rank = 0"))
    assert train(path, edits, tmp_path / "run") == 0
    state, description = read_lora(tmp_path / "run" / "student.safetensors")
    assert state["lora_strengths.out.weight"].any() and description["strengths"]
    student = open_student(open_source(ModelConfig(path=f"{folder}/model")), state, description)
    assert student.strengths is not None and student.strengths.default == (7.5, 1.5)


def test_strengths_that_cannot_be_taught_are_refused(folder, pairs, edits, tmp_path, capsys):
    def said(config, data) -> str:
        assert train(config, data, tmp_path / "run") == 2
        return capsys.readouterr().err

    assert "have no text_strength; make the items" in said(told(folder, tmp_path), pairs)
    assert "[strengths] text is 50, and the items" in said(told(folder, tmp_path, text=50), edits)
    add = told(folder, tmp_path, more="method = 'add'")
    assert "the discriminator of ADD does not see the strengths" in said(add, edits)
    other = told(folder, tmp_path, name="fixed")
    text = other.read_text().replace("[3.0, 10.0]", "[7.5]").replace("[1.0, 2.2]", "[1.5]")
    other.write_text(text)
    assert main(["cache", str(other), "--data", str(pairs), "--out", str(tmp_path / "fixed")]) == 0
    capsys.readouterr()
    assert "have the same strengths" in said(other, tmp_path / "fixed")


def test_memory_is_planned_with_the_strengths(folder, edits, tmp_path, capsys):
    assert main(["plan", str(told(folder, tmp_path)), "--data", str(edits), "--cpu"]) == 0
    assert "a step needs" in capsys.readouterr().out


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
