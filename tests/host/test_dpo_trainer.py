"""DPO Trainer in the real server: pairs of Picture Folder, a model and a turbo that learn from them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from graphs import node
from PIL import Image
from run_files import check_cancelled_run, fails, log_of, lora_of, run_folder, steps_of
from server import Host, run_probe
from test_datasets import folder_of
from test_picture_folder import by_bucket

from distill_core.cli.main import main
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.training.run_folder import RunFolder

PREFERRED, REJECTED = "preferred examples (shipped)", "rejected examples (shipped)"
FOLDERS = [mini.ASSETS.parent / name for name in ("preferred", "rejected")]
PARTS = {
    "mini": node("TurboDistillLoadMiniModel", distilled=False),
    "model": node("ModelSamplingSD3", model=["mini", 0], shift=1.0),
    "boot": node("TurboDistillMiniConditioning", class_name="ankle boot"),
    "none": node("TurboDistillMiniConditioning", class_name="none"),
}


def pairs(name: str, **pictures) -> dict:
    """The mini model and the example pairs."""
    settings = dict(folder=PREFERRED, rejected_folder=REJECTED, dataset_name=name, size=64, step=16, dtype="float32")
    wired = dict(model=["model", 0], vae=["mini", 1], clip=["mini", 2])
    return PARTS | {"pairs": node("TurboDistillPictureFolder", **wired, **(settings | pictures))}


def training(run_name: str, pictures: dict | None = None, **trainer) -> dict:
    settings = dict(steps=4, batch_size=4, student_lr=1e-3, rank=4, cfg=1.5, gradient_checkpointing=False)
    wired = dict(model=["model", 0], dataset=["pairs", 0], run_name=run_name)
    return pairs("pairs", **(pictures or {})) | {
        "train": node("TurboDistillDPOTrainer", **wired, **(settings | trainer)),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{run_name}"),
    }


def turbo(run_name: str, **trainer) -> dict:
    """The same for the mini turbo."""
    graph = training(run_name, **({"preference_levels": "student"} | trainer))
    return graph | {
        "mini": node("TurboDistillLoadMiniModel", distilled=True),
        "model": node("ModelSamplingSD3", model=["mini", 0], shift=1.0),
    }


def pictures_of(host: Host, lora: str = "") -> np.ndarray:
    """Boots [N, H, W] in [0, 1] by core's KSampler, of the model with a LoRA that core loads."""
    sampling = dict(seed=3, steps=12, cfg=1.5, sampler_name="euler", scheduler="simple", denoise=1.0)
    wired = dict(positive=["boot", 0], negative=["none", 0], latent_image=["empty", 0])
    graph = PARTS | {
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=8),
        "sample": node("KSampler", model=["lora" if lora else "model", 0], **wired, **sampling),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["mini", 1]),
        "keep": node("SaveImage", images=["decode", 0], filename_prefix="preference"),
    }
    if not lora:
        del graph["lora"]
    found = host.run(graph, 120)["outputs"]["keep"]["images"]
    files = [host.base_dir / "output" / file["subfolder"] / file["filename"] for file in found]
    return np.stack([np.asarray(Image.open(file).convert("L"), dtype=float) / 255 for file in files])


# Pairs of pictures


def test_the_dataset_is_the_commands(host, tmp_path):
    said = "".join(host.run(pairs("both"), 120)["outputs"]["pairs"]["text"])
    assert "12 pictures in 3 sizes" in said and "each with a rejected one: 12 pairs" in said
    (tmp_path / "c.toml").write_text(f"[pictures]\nsize = 64\nstep = 16\nrejected = '{FOLDERS[1]}'\n")
    assert main(["cache", str(tmp_path / "c.toml"), "--images", str(FOLDERS[0]), "--out", str(tmp_path / "data")]) == 0
    made, expected = by_bucket(folder_of(host, "both")), by_bucket(tmp_path / "data")
    assert made.keys() == expected.keys() and len(expected) == 3
    for bucket, batch in expected.items():
        ours = made[bucket]
        for mine, theirs in ((ours.latents, batch.latents), (ours.beside["rejected"], batch.beside["rejected"])):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        assert (batch.latents - batch.beside["rejected"]).abs().max() > 0.1


@pytest.fixture
def own(host):
    """Own folders, the rejected pictures inside of the others."""
    folder = host.base_dir / "input" / "liked"
    shutil.rmtree(folder, ignore_errors=True)
    for source, target in zip(FOLDERS, (folder, folder / "rejected"), strict=True):
        shutil.copytree(source, target)
    return folder


def test_a_rejected_folder_of_ones_own_is_watched(host, own):
    graph = pairs("watched", folder="liked", rejected_folder="liked/rejected")
    said = "".join(host.run(graph, 120)["outputs"]["pairs"]["text"])
    assert "12 pictures" in said and "12 pairs" in said and "left out" not in said
    (own / "rejected" / "bag_2.png").unlink()
    assert "1 gone (bag_2.png)" in fails(host, graph)
    graph["pairs"]["inputs"]["dataset_name"] = "watched_2"
    said = "".join(host.run(graph, 120)["outputs"]["pairs"]["text"])
    assert "11 pairs" in said and "left out: bag_2.png (has no rejected picture of its name)" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(masks="random"), "pairs of a preferred and a rejected picture have no masks"),
        (dict(folder="liked/rejected", rejected_folder="liked"), "all pictures are rejected ones"),
        (dict(folder="liked/rejected", rejected_folder="liked/rejected/none"), "Value not in list"),
    ],
)
def test_folders_that_are_no_pairs_are_refused(host, own, change, message):
    graph = pairs("no_pairs", **change)
    if "list" in message:
        with pytest.raises(Exception, match=message):
            host.queue(graph)
    else:
        assert message in fails(host, graph)
    assert not (folder_of(host, "no_pairs") / "dataset.json").exists()


# A model of many steps


@pytest.fixture(scope="module")
def tuned(host) -> tuple[Host, dict]:
    """The mini model after some steps on the example pairs, and what the node's last look was."""
    previews = dict(vae=["mini", 1], preview_positive=["boot", 0], preview_negative=["none", 0], preview_every=30)
    graph = training("liked", steps=60, batch_size=8, rank=16, beta=100.0, **previews)
    graph["settings"] = node("TurboDistillTrainingSettings", validation=2.0, validation_every=30)
    graph["train"]["inputs"]["settings"] = ["settings", 0]
    return host, host.run(graph, 600)["outputs"]


def test_the_log_has_the_loss_and_the_implicit_accuracy(tuned):
    host, outputs = tuned
    log = log_of(host, "liked")
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert log[0]["preference"] == pytest.approx(0.6931, abs=1e-4) and log[0]["margin"] == 0
    last = log[-10:]
    assert sum(entry["implicit_accuracy"] for entry in last) / 10 > 0.9
    assert sum(entry["preference"] for entry in last) / 10 < 0.4
    assert {"validation", "validation_accuracy"} <= log[-1].keys()
    (said,) = outputs["train"]["text"]
    assert "trained at all noise levels of the model" in said and "says that it is a turbo" not in said


def test_the_file_is_an_ordinary_lora_that_core_loads(tuned):
    """Light from the left was preferred: on boots from the same noise the left is lighter than before."""
    host, _ = tuned
    _, described = read_lora(lora_of(host, "liked"))
    assert described["method"] == "Diffusion-DPO" and "sigmas" not in described and described["steps"] == 60
    before = len(host.log())
    after, plain = pictures_of(host, "liked_00001_.safetensors"), pictures_of(host)
    said = host.log()[before:]
    assert "lora key not loaded" not in said and "NOT LOADED" not in said
    light = [images[..., :32].mean() - images[..., 32:].mean() for images in (plain, after)]
    print("left - right, before and after", light)
    assert light[1] > light[0] + 0.1


def test_the_report_shows_before_and_after(tuned):
    host, _ = tuned
    with Image.open(run_folder(host, "liked") / "report.png") as picture:
        rows = (picture.height - 480) / (128 + 4)
    assert 2 <= rows < 3, "two rows, and a title"
    started = json.loads((run_folder(host, "liked") / "started.json").read_text())
    assert started["tunes"] is True and started["guidance"] == 1.5
    assert len(list((run_folder(host, "liked") / "samples").glob("*.jpg"))) == 2


def test_a_cancelled_run_goes_on_to_the_same_weights(host):
    check_cancelled_run(host, training)


def test_it_is_the_commands_run(host, tmp_path):
    """Method, loop and student are described alike. The two LoRAs' layers are other ones, so figures are only near."""
    host.run(training("alike", steps=2, seed=5), 120)
    (tmp_path / "c.toml").write_text(
        "method = 'dpo'\n[model]\nlora_rank = 4\n[cache]\nguidance = 1.5\n"
        "[train]\nsteps = 2\nbatch_size = 4\nseed = 5\n"
        "student_lr = 1e-3\ndiscriminator_lr = 1e-4\nbetas = [0.9, 0.99]\n"
    )
    data = folder_of(host, "pairs")
    assert main(["train", str(tmp_path / "c.toml"), "--data", str(data), "--out", str(tmp_path / "run")]) == 0
    ours, theirs = read_lora(lora_of(host, "alike"))[1], read_lora(tmp_path / "run" / "student.safetensors")[1]
    assert ours["config"]["dpo"] == theirs["config"]["dpo"] and ours["config"]["student"] == theirs["config"]["student"]
    assert ours["config"]["train"] == theirs["config"]["train"]
    logs = log_of(host, "alike"), RunFolder(tmp_path / "run").logs()
    for name in ("preference", "margin", "chosen", "rejected"):
        assert [entry[name] for entry in logs[0]] == pytest.approx(
            [entry[name] for entry in logs[1]], rel=0.2, abs=1e-4
        )


# A turbo


def test_a_turbo_learns_at_its_own_levels(host):
    """Turbo Sampler then takes them from the file, and retention is in the log."""
    (said,) = host.run(turbo("turbo"), 300)["outputs"]["train"]["text"]
    assert "trained as the turbo is sampled: 4 steps: 1, 0.75, 0.5, 0.25, 0" in said
    _, described = read_lora(lora_of(host, "turbo"))
    assert described["sigmas"] == [1.0, 0.75, 0.5, 0.25] and described["sampler"] == "ancestral"
    assert "retention" in log_of(host, "turbo")[-1]
    wired = dict(model=["tuned", 0], positive=["boot", 0], latent_image=["empty", 0])
    choice = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=1, sampler="of the preset", cfg=0.0)
    graph = {name: part for name, part in turbo("turbo").items() if name in PARTS} | {
        "tuned": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="turbo_00001_.safetensors", strength_model=1.0
        ),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": node("TurboDistillSampler", **wired, **choice),
        "show": node("SaveLatent", samples=["sample", 0], filename_prefix="turbo"),
    }
    said = "".join(host.run(graph, 120)["outputs"]["sample"]["text"])
    assert "4 steps: 1, 0.75, 0.5, 0.25, 0" in said and "WARNING" not in said


def test_a_turbo_at_all_levels_is_told_that_it_loses_its_steps(host):
    (said,) = host.run(turbo("all_levels", preference_levels="all", steps=2), 120)["outputs"]["train"]["text"]
    assert "says that it is a turbo, whose few steps only preference_levels = student keeps" in said


MISTAKES = {
    "pictures alone": (dict(rejected_folder="none"), {}, "with rejected_folder of Picture Folder"),
    "a preset at all levels": ({}, dict(preset="sd3.5-large-turbo"), "preset and turbo_steps are of a turbo"),
    "turbo steps at all levels": ({}, dict(turbo_steps=4), "preset and turbo_steps are of a turbo"),
    "a turbo of another family": ({}, dict(preference_levels="student", preset="sdxl-turbo"), "is for sd21 or sdxl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_training(host, mistake):
    pictures, trainer, message = MISTAKES[mistake]
    name = mistake.replace(" ", "_")
    graph = training(name, pictures | {"dataset_name": name}, **trainer)
    assert message in fails(host, graph)
    assert steps_of(host, name) == [] and not lora_of(host, name).exists()


def test_another_beta_is_another_run(host):
    host.run(training("once"), 120)
    assert "beta is 30 now, was 2000" in fails(host, training("once", beta=30.0))


# Tiny networks of other families


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    """What probe_dpo.py finds."""
    return json.loads(run_probe("probe_dpo.py", tmp_path_factory.mktemp("probe")).splitlines()[-1])


@pytest.mark.parametrize("family", ["sd15", "flux", "flux-schnell", "lumina"])
def test_a_network_of_every_kind_learns_from_pairs(probe, family):
    found = probe[family]
    assert found["first"] == pytest.approx(0.6931, abs=1e-4) and found["trained"] > 0 and found["finite"]
    assert 0 <= found["accuracy"] <= 1 and found["warnings"] == [] and found["effect"] > 1e-4
    assert found["levels"] == found["wanted"]
