"""Inpainting from the command line: pictures with masks become a dataset that trains an inpainting pipeline."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import flux_fill, sd3_inpainting, sd_inpainting, sdxl_inpainting

from distill_core.cli.main import main
from distill_core.cli.sample import first_items
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.samplers import sample
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.lora_files import read_lora
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.items import ITEM_TENSORS
from distill_core.models.pipelines import ModelConfig, open_source

INPAINTING = ("inpaint_mask", "masked_image")
PIPELINES = {
    sd_inpainting: (16, INPAINTING),
    sdxl_inpainting: (16, INPAINTING),
    sd3_inpainting: (16, INPAINTING),
    flux_fill: (64, ("masked_image", "pixel_mask")),  # its latents are of as many positions
}


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda build: build.__name__)
def kind(request):
    """What makes the pipeline."""
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """A tiny pipeline, six pictures with captions, and a configuration."""
    side = PIPELINES[kind][0]
    folder = tmp_path_factory.mktemp(kind.__name__)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind().save_pretrained(folder / "model")
    images, rng = folder / "images", numpy.random.default_rng(0)
    images.mkdir()
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=numpy.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("a red dog")
    for name, source in (("masked", "random"), ("plain", "none")):
        (folder / f"{name}.toml").write_text(
            f"[model]\npath = '{folder / 'model'}'\nlora_rank = 2\n"
            f"[pictures]\nsize = {side}\nstep = {side}\nbatch_size = 4\n"
            f'[masks]\nsource = "{source}"\n[cache]\nsizes = [[8, 8]]\n[ladd]\nwarmup_steps = 0\n'
            "[train]\nbatch_size = 2\nsteps = 2\nwarmup_steps = 1\ncaption_dropout = 0.5\n[discriminator]\nwidth = 8\n"
        )
    return folder


@pytest.fixture(scope="module")
def data(folder):
    for name in ("masked", "plain"):
        command = ["cache", f"{folder / name}.toml", "--images", str(folder / "images"), "--out", str(folder / name)]
        assert main(command) == 0
    return folder / "masked"


def train(folder, data, out: str) -> int:
    command = ["train", str(folder / "masked.toml"), "--data", str(folder / data), "--out", str(folder / out)]
    return main([*command, "--no-preflight"])


def test_pictures_become_items_that_train(kind, folder, data):
    dataset, source = LatentDataset(data), open_source(ModelConfig(path=str(folder / "model")))
    batch = dataset.batch(0, 2, 0)
    assert source.backend.limits().items == PIPELINES[kind][1]
    assert batch.cond.extra["masked_image"].shape == batch.latents.shape and dataset.uncond().extra == {}
    torch.testing.assert_close(batch.cond.context, source.encode(["a red dog"] * 2)[0].context)
    assert train(folder, "masked", "run") == 0
    state, description = read_lora(folder / "run" / "student.safetensors")
    assert state and description["steps"] == 2
    source.backend.open_lora(state)


def test_samples_are_of_the_items_of_a_dataset(folder, data, tmp_path):
    """Each has the noise of its number, and the text and the mask of its item; more than there are items is none."""
    command = [
        "sample",
        str(folder / "masked.toml"),
        "--data",
        str(data),
        "--steps",
        "3",
        "--count",
        "9",
        "--seed",
        "4",
    ]
    assert main([*command, "--out", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "samples.json").read_text())
    assert [row["item"] for row in said] == list(range(6)) and len(list(tmp_path.glob("*.png"))) == 6
    source, dataset = open_source(ModelConfig(path=str(folder / "model"))), LatentDataset(data)
    batch, process = first_items(dataset, 6), source.backend.process
    scale = 1.0 if source.backend.takes_guidance else 5.0
    teacher = Guided(Denoiser(source.backend), dataset.uncond(), scale)
    shape = batch.latents.shape[1:]
    options = dict(seed=4, items=[2], sampler="euler")
    latent = sample(teacher, process, grid_sigmas(process, 3), batch.cond[[2]], shape, **options)
    drawn = numpy.asarray(Image.open(tmp_path / "00002.png")).astype(float)
    expected = ((source.decode(latent)[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert abs(drawn - expected).max() <= 1


def test_samples_of_pictures_without_masks_are_refused(kind, folder, data, tmp_path, capsys):
    command = ["sample", str(folder / "masked.toml"), "--data", str(folder / "plain"), "--out", str(tmp_path)]
    assert main(command) == 2 and f"has no {PIPELINES[kind][1][0]}" in capsys.readouterr().err


def test_diffusers_inpaints_with_the_student(kind, folder, data):
    """Its LoRA loads into the pipeline it was trained on and changes what that fills in."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    if not (folder / "loaded" / "student.safetensors").exists():
        assert train(folder, "masked", "loaded") == 0
    state, _ = read_lora(folder / "loaded" / "student.safetensors")
    backend = open_source(ModelConfig(path=str(folder / "model"))).backend
    lora = backend.open_lora({name: value + 0.1 for name, value in state.items()})  # two steps change next to nothing
    save_file(backend.export(lora), folder / "strong.safetensors")
    index = json.loads((folder / "model" / "model_index.json").read_text())
    absent = [name for name, part in index.items() if isinstance(part, list) and part[0] is None]
    pipeline = DiffusionPipeline.from_pretrained(folder / "model", **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    side = PIPELINES[kind][0]
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side))
    image = Image.open(folder / "images" / "0.png")
    asked = dict(image=image, mask_image=mask, height=side, width=side, output_type="np")

    def fill():
        generator = torch.Generator().manual_seed(0)
        return pipeline("cat", num_inference_steps=2, strength=1.0, generator=generator, **asked).images

    before = fill()
    pipeline.load_lora_weights(folder / "strong.safetensors")
    assert abs(before - fill()).max() > 1e-3


def test_pictures_without_masks_are_refused_before_training(kind, folder, data, capsys):
    assert train(folder, "plain", "refused") == 2
    name = PIPELINES[kind][1][0]
    assert f"has no {name} ({ITEM_TENSORS[name].what})" in capsys.readouterr().err


def test_memory_is_planned_with_the_masks(folder, capsys):
    assert main(["plan", str(folder / "masked.toml"), "--cpu"]) == 0
    assert "a step needs" in capsys.readouterr().out


def test_a_picture_from_the_text_alone_is_refused_in_words(kind, folder, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("cat\n")
    text = (folder / "masked.toml").read_text() + f"[prompts]\nprompts = '{tmp_path / 'prompts.txt'}'\n"
    (tmp_path / "c.toml").write_text(text)
    assert main(["sample", str(tmp_path / "c.toml"), "--count", "1", "--out", str(tmp_path / "out")]) == 2
    taken = " and ".join(PIPELINES[kind][1])
    assert f"takes {taken} of every picture beside its latent" in capsys.readouterr().err
