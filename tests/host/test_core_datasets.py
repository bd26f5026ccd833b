"""What core's (experimental) dataset nodes make, as a dataset of ours, in the real server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphs import node
from run_files import log_of
from test_datasets import everything, folder_of, only

from distill_core.data.dataset import LatentDataset
from distill_core.models import mini

MINI = {
    "mini": node("TurboDistillLoadMiniModel", distilled=False),
    "teacher": node("ModelSamplingSD3", model=["mini", 0], shift=1.0),
    "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
    "none": node("TurboDistillMiniConditioning", class_name="none"),
}


def pictures() -> dict:
    """A picture of each class, as a list of ten IMAGEs."""
    sampling = dict(preset="auto", steps=4, denoise=1.0, denoise_mode="snap", seed=7, sampler="of the preset", cfg=0.0)
    return MINI | {
        "student": node("TurboDistillLoadMiniModel", distilled=True),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": node(
            "TurboDistillSampler", model=["student", 0], positive=["classes", 0], latent_image=["latent", 0], **sampling
        ),
        "pictures": node("VAEDecode", samples=["sample", 0], vae=["mini", 1]),
    }


def latents_dataset(name: str, latents: list, positive: list) -> dict:
    return only(
        {
            "dataset": node(
                "TurboDistillLatentsDataset",
                model=["teacher", 0],
                latents=latents,
                positive=positive,
                negative=["none", 0],
                dataset_name=name,
                dtype="float32",
            )
        }
    )


def loaded(folder: str, name: str) -> dict:
    graph = MINI | {"core": node("LoadTrainingDataset", folder_name=folder)}
    return graph | latents_dataset(name, ["core", 0], ["core", 1])


def saved(latents: list, conditioning: list, folder: str) -> dict:
    return {
        "write": node(
            "SaveTrainingDataset", latents=latents, conditioning=conditioning, folder_name=folder, shard_size=4
        )
    }


@pytest.fixture(scope="module")
def from_texts(host) -> Path:
    """Pictures and captions through Make Training Dataset: at once, and over the disk."""
    texts = "\n".join(mini.CLASS_NAMES)
    graph = pictures() | {
        "clip": node("TestTinyClip"),
        "texts": node("TurboDistillPrompts", prompts=texts),
        "make": node(
            "MakeTrainingDataset", images=["pictures", 0], vae=["mini", 1], clip=["clip", 0], texts=["texts", 0]
        ),
    }
    graph |= latents_dataset("made", ["make", 0], ["make", 1]) | saved(["make", 0], ["make", 1], "core_made")
    host.run(graph, 120)
    host.run(loaded("core_made", "made_and_loaded"), 60)
    return host.base_dir


def test_make_training_dataset_gives_a_latent_and_a_text_each(host, from_texts):
    _, made = everything(folder_of(host, "made"))
    assert made.latents.shape == (10, 16, 8, 8) and made.cond.context.shape == (10, 77, 64)
    assert len(made.cond.pooled.unique(dim=0)) == 10
    assert 0.5 < made.latents.std() < 2, "scaled once"


def test_over_the_disk_it_is_the_same(host, from_texts):
    (_, direct), (_, read) = everything(folder_of(host, "made")), everything(folder_of(host, "made_and_loaded"))
    assert torch.equal(direct.latents, read.latents) and torch.equal(direct.cond.context, read.cond.context)
    assert torch.equal(direct.cond.pooled, read.cond.pooled)


def test_a_loaded_dataset_is_trained_on(host):
    """Encoded pictures with the mini model's own conditionings, saved and loaded by core, then a few steps of LADD."""
    graph = pictures() | {"encode": node("VAEEncode", pixels=["pictures", 0], vae=["mini", 1])}
    host.run(graph | saved(["encode", 0], ["classes", 0], "core_images"), 60)
    graph = loaded("core_images", "core_images")
    graph["train"] = node(
        "TurboDistillLADDTrainer",
        model=["teacher", 0],
        dataset=["dataset", 0],
        run_name="core_images",
        target_steps=1,
        steps=3,
        batch_size=8,
        student_lr=6e-4,
        discriminator_lr=4e-3,
        rank=4,
    )
    graph["save"] = node("TurboDistillSaveLora", lora=["train", 1], filename_prefix="loras/core_images")
    host.run(graph, 120)
    assert [entry["step"] for entry in log_of(host, "core_images")] == [1, 2, 3]


def test_a_batch_of_images_shares_its_conditioning(host):
    """Two latents of a list, one a batch of two, with two conditionings: three items."""
    graph = MINI | {
        "one": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "two": node("EmptySD3LatentImage", width=128, height=64, batch_size=2),
        "bag": node("TurboDistillMiniConditioning", class_name="bag"),
        "coat": node("TurboDistillMiniConditioning", class_name="coat"),
        "latents": node("CreateList", **{"inputs.input0": ["one", 0], "inputs.input1": ["two", 0]}),
        "texts": node("CreateList", **{"inputs.input0": ["bag", 0], "inputs.input1": ["coat", 0]}),
    }
    host.run(graph | latents_dataset("batches", ["latents", 0], ["texts", 0]), 60)
    dataset = LatentDataset(folder_of(host, "batches"))
    table = mini.load_conditioning()["context"]
    for places, shape, label, count in ((0, (16, 8, 8), "bag", 1), (1, (16, 8, 16), "coat", 2)):
        items = dataset.read(list(dataset.buckets.values())[places])
        assert items.latents.shape == (count, *shape)
        assert all(torch.equal(context, table[mini.CLASS_NAMES.index(label)]) for context in items.cond.context)
