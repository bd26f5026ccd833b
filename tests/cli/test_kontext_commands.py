"""FLUX.1 Kontext from the command line: pairs of pictures become a dataset that trains it."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import flux_kontext

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.lora_files import read_lora
from distill_core.models.pipelines import ModelConfig, open_source

CONFIG = """
[model]
path = '{folder}/model'
lora_rank = 2
[pictures]
size = 16
step = 16
batch_size = 4
{sources}
[ladd]
warmup_steps = 0
terms = {{ adversarial = 1.0, distillation = 2.5 }}
[train]
batch_size = 2
steps = 2
warmup_steps = 1
[discriminator]
width = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline, four pairs of pictures with captions, and configurations with and without the pairs."""
    folder = tmp_path_factory.mktemp("kontext")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux_kontext().save_pretrained(folder / "model")
    rng = numpy.random.default_rng(0)
    for name in ("before", "after"):
        (folder / name).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text("make it red")
    for name, sources in (("pairs", f"sources = '{folder}/before'"), ("alone", "")):
        (folder / f"{name}.toml").write_text(CONFIG.format(folder=folder, sources=sources))
        command = ["cache", f"{folder}/{name}.toml", "--images", f"{folder}/after", "--out", f"{folder}/{name}"]
        assert main(command) == 0
    return folder


def train(folder, data: str) -> int:
    command = ["train", f"{folder}/pairs.toml", "--data", f"{folder}/{data}", "--out", f"{folder}/run_{data}"]
    return main([*command, "--no-preflight"])


def test_pairs_of_pictures_train_it(folder, tmp_path):
    dataset, source = LatentDataset(folder / "pairs"), open_source(ModelConfig(path=str(folder / "model")))
    batch = dataset.batch(0, 2, 0)
    assert batch.cond.extra.keys() == {"reference_image"} and source.backend.limits().items == ("reference_image",)
    assert batch.cond.extra["reference_image"].shape == batch.latents.shape
    assert train(folder, "pairs") == 0
    state, described = read_lora(folder / "run_pairs" / "student.safetensors")
    assert described["steps"] == 2 and source.backend.open_lora(state)
    assert main(["plan", f"{folder}/pairs.toml", "--cpu"]) == 0
    lora = ["--lora", f"{folder}/run_pairs/student.safetensors"]
    command = ["sample", f"{folder}/pairs.toml", "--data", f"{folder}/pairs", *lora, "--count", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0 and len(list(tmp_path.glob("*.png"))) == 2


def test_pictures_alone_are_refused_before_training(folder, capsys):
    assert train(folder, "alone") == 2 and "has no reference_image" in capsys.readouterr().err
