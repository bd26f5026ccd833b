"""Tuning a turbo from the command line: its samples first, then the run; adapters; one merged file; every family."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli.test_family_defaults import discrete, flux
from cli.test_main import needs_signals, started
from networks import build_network
from PIL import Image
from safetensors import safe_open
from tiny_pipelines import text_encoder

from distill_core.cli.main import main
from distill_core.cli.sample import load_student
from distill_core.data.dataset import LatentDataset
from distill_core.data.real import save_latents
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, cumulative_alphas
from distill_core.files import load_tensors
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.models.mini import mini_conditioning
from distill_core.training.config import load_config
from distill_core.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIG = """
method = "tune"
[model]
loras = ["mini"]
lora_rank = 4
[kept]
count = 12
share = 0.5
batch_size = 4
[cache]
sizes = [[8, 8]]
[train]
steps = 4
batch_size = 2
checkpoint_every = 1000
[discriminator]
width = 16
"""


def own_pictures(folder: Path, shapes=((8, 8), (8, 8))) -> Path:
    cond, empty = mini_conditioning()
    latents = [ItemNoise(9, [i]).normal(mini.LATENT_SHAPE[0], *shapes[i % len(shapes)])[0] for i in range(6)]
    save_latents(latents, [cond[[i]] for i in range(6)], empty, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A folder with a config, own pictures and a finished run."""
    root = tmp_path_factory.mktemp("tune")
    (root / "c.toml").write_text(CONFIG)
    own_pictures(root / "own")
    assert main(["train", str(root / "c.toml"), "--data", str(root / "own"), "--out", str(root / "run")]) == 0
    return root


def test_it_says_how_the_turbo_is_used_and_keeps_its_samples(tuned, capsys):
    assert main(["train", str(tuned / "c.toml"), "--data", str(tuned / "own"), "--out", str(tuned / "run")]) == 0
    said = capsys.readouterr().out
    assert "the turbo is used at 1, 0.75, 0.5, 0.25 with ancestral, cfg 1 (Source: student.safetensors" in said
    assert "this run has ended" in said
    kept = LatentDataset(tuned / "run" / "kept")
    assert len(kept) == 12 and kept.state_sigmas == (1.0, 0.75, 0.5, 0.25)
    assert kept.manifest()["kept"] == {"sampler": "ancestral", "options": {"eta": 1.0}}
    logs = RunFolder(tuned / "run").logs()
    assert [("keep" in entry, "denoising" in entry) for entry in logs] == [(False, True), (True, False)] * 2
    _, description = read_lora(tuned / "run" / "student.safetensors")
    assert description["sigmas"] == [1.0, 0.75, 0.5, 0.25] and description["sampler"] == "ancestral"
    assert description["sampler_options"] == {"eta": 1.0} and description["method"] == "Tune Turbo"
    assert [lora["name"] for lora in description["below"]] == ["student.safetensors"]


def test_the_students_file_stands_on_the_turbo_and_merged_on_the_base(tuned, capsys):
    student = tuned / "run" / "student.safetensors"
    assert main(["merge", str(tuned / "c.toml"), "--lora", str(student), "--out", str(tuned / "one.safetensors")]) == 0
    cond, _ = mini_conditioning()
    x, sigma = ItemNoise(0, range(2)).normal(*mini.LATENT_SHAPE), torch.tensor([1.0, 0.5])
    _, above, _ = load_student(load_config(tuned / "c.toml"), student)
    (tuned / "base.toml").write_text(CONFIG.replace('loras = ["mini"]', ""))
    capsys.readouterr()
    _, alone, description = load_student(load_config(tuned / "base.toml"), tuned / "one.safetensors")
    assert description["warnings"] == [] and capsys.readouterr().err == "" and "below" not in description
    torch.testing.assert_close(above(x, sigma, cond[:2]), alone(x, sigma, cond[:2]), atol=2e-5, rtol=1e-4)
    _, _, description = load_student(load_config(tuned / "base.toml"), student)
    assert "was made above the LoRA student.safetensors" in description["warnings"][0]
    for config, words in (("base.toml", "names no LoRA"), ("c.toml", "trained above 0 LoRAs")):
        lora = tuned / "one.safetensors"
        assert main(["merge", str(tuned / config), "--lora", str(lora), "--out", str(tuned / "no.safetensors")]) == 2
        assert words in capsys.readouterr().err


@needs_signals
def test_two_processes_end_at_the_same_step_when_too_much_was_lost(tuned, tmp_path):
    rule = "retention_every = 1\nkeep_at_least = 0.999\nstudent_lr = 0.1\n"
    changed = CONFIG.replace("steps = 4\nbatch_size = 2", "steps = 8\nbatch_size = 4") + rule
    (tmp_path / "c.toml").write_text(changed.replace("[discriminator]\nwidth = 16\n", ""))
    run = RunFolder(tmp_path / "run")
    command = ("train", tmp_path / "c.toml", "--data", tuned / "own", "--out", run.path)
    with started(*command, processes=2) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    last = run.logs()[-1]
    assert last["retention"] < 0.999 and last["step"] < 8
    assert f"ended after step {last['step']}: retention" in errors


def test_killed_while_it_makes_samples_it_goes_on_to_the_same_run(tuned, tmp_path):
    """A kill in the middle of the kept dataset, and one more run: kept samples and student are those of one run."""
    (tmp_path / "c.toml").write_text(
        CONFIG.replace("count = 12", "count = 80").replace("batch_size = 4", "batch_size = 2")
    )
    shutil.copytree(tuned / "own", tmp_path / "own")
    command = ["train", str(tmp_path / "c.toml"), "--data", str(tmp_path / "own"), "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-m", "distill_core", *command, str(stopped)], env=environment)
    deadline = time.monotonic() + 120
    while (
        not list(stopped.glob("kept/shard-*.part-*.safetensors"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(stopped.glob("kept/shard-*.part-*.safetensors")), "it was killed while it made samples"
    for out in (stopped, whole):
        assert main([*command, str(out)]) == 0
    names = sorted(path.name for path in (whole / "kept").glob("shard-*"))
    assert names == sorted(path.name for path in (stopped / "kept").glob("shard-*"))
    for name in [*(f"kept/{name}" for name in names), "student.safetensors"]:
        (a, _), (b, _) = (load_tensors(out / name) for out in (stopped, whole))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_own_pictures_of_several_sizes_have_kept_samples_of_each(tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG)
    own_pictures(tmp_path / "own", ((8, 8), (6, 10)))
    command = ["train", str(tmp_path / "c.toml"), "--data", str(tmp_path / "own"), "--out", str(tmp_path / "run")]
    assert main([*command, "--no-preflight"]) == 0
    kept = LatentDataset(tmp_path / "run" / "kept")
    assert {shape[1:]: len(items) for shape, items in zip(kept.shapes, kept.buckets.values(), strict=True)} == {
        (8, 8): 6,
        (6, 10): 6,
    }


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('loras = ["mini"]', 'preset = "flux-schnell"', "preset flux-schnell is for flux-schnell"),
        ('loras = ["mini"]', 'loras = ["mini"]\npreset_steps = 7', "steps must be 1-4"),
        ("[kept]", "[kept]\nprompts = 'nowhere.txt'", "[kept] prompts: there is no file nowhere.txt"),
        ('loras = ["mini"]', "loras = ['nowhere.safetensors']", "nowhere.safetensors"),
        ("[train]", "[tune]\nterms = { pairs = 1.0 }\n[train]", "terms must weight some of adversarial"),
        ("[train]", "[lora]\nadapter = 'x'\n[train]", "an adapter is for ordinary training"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(tuned, tmp_path, capsys, old, new, words):
    (tmp_path / "c.toml").write_text(CONFIG.replace(old, new, 1))
    command = ["train", str(tmp_path / "c.toml"), "--data", str(tuned / "own"), "--out", str(tmp_path / "run")]
    if "adapter" in new:
        (tmp_path / "x").write_bytes((tuned / "run" / "student.safetensors").read_bytes())
        (tmp_path / "c.toml").write_text((tmp_path / "c.toml").read_text().replace("'x'", f"'{tmp_path / 'x'}'"))
    assert main(command) == 2
    assert words in capsys.readouterr().err


def test_kept_samples_of_another_turbo_are_not_taken(tuned, tmp_path, capsys):
    shutil.copytree(tuned / "run", tmp_path / "run")
    (tmp_path / "c.toml").write_text(CONFIG.replace("[kept]", "[kept]\nseed = 5"))
    assert main(["train", str(tmp_path / "c.toml"), "--data", str(tuned / "own"), "--out", str(tmp_path / "run")]) == 2
    assert "[kept] seed is 5 now, was 0" in capsys.readouterr().err


def test_an_adapter_is_made_and_trained_over(tuned, capsys):
    assert main(["adapter", str(tuned / "c.toml"), "--out", str(tuned / "adapter")]) == 0
    adapter = tuned / "adapter" / "adapter.safetensors"
    _, description = read_lora(adapter)
    assert description["method"] == "Training adapter" and len(LatentDataset(tuned / "adapter" / "kept")) == 12
    over = CONFIG + f"[lora]\nadapter = '{adapter}'\n[tune]\nterms = {{ denoising = 1.0 }}\n"
    (tuned / "over.toml").write_text(over)
    command = ["train", str(tuned / "over.toml"), "--data", str(tuned / "own"), "--out", str(tuned / "over")]
    assert main([*command, "--no-preflight"]) == 0
    _, description = read_lora(tuned / "over" / "student.safetensors")
    assert description["adapter"] == "adapter.safetensors" and description["method"] == "Denoising"
    assert description["sampler"] == "ancestral" and not (tuned / "over" / "kept").exists()
    logs = RunFolder(tuned / "over").logs()
    assert all("denoising" in entry and "discriminator" not in entry for entry in logs)
    (tuned / "over.toml").write_text(over.replace("adapter =", "start_from ="))  # resumed without it
    with safe_open(tuned / "over" / "checkpoint.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "over" in name]
    assert main([*command, "--no-preflight"]) == 2
    assert "[lora] adapter" in capsys.readouterr().err


def sd15():
    """A tiny eps UNet of SD 1.5's family."""
    pipeline = discrete()
    pipeline.unet, pipeline.text_encoder = build_network("unet", cross_attention_dim=768), text_encoder(768)
    return pipeline


FAMILIES = {
    "flux schnell, by its family": (lambda: flux(False), "", "", "euler", [1.0, 0.75, 0.5, 0.25], 1.0),
    "SD 1.5, by a preset with guidance": (
        sd15,
        'preset = "hyper-sd-cfg-lora"\npreset_steps = 8',
        "",
        "euler",
        DiscreteProcess(cumulative_alphas()).sigmas[[999, 874, 749, 624, 499, 374, 249, 124]].tolist(),
        5.0,
    ),
    "an unknown UNet, by its levels": (
        discrete,
        "sampler = 'ancestral'",
        "student_sigmas = [14.6146, 0.6932]",
        "ancestral",
        [14.6146, 0.6932],
        1.0,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_a_step_at_its_turbos_levels(family, tmp_path, capsys):
    build, of_model, of_tune, sampler, levels, cfg = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red dog\ncat\n")
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 40 + number).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "c.toml").write_text(
        f"""
        method = "tune"
        [model]
        path = '{tmp_path / "model"}'
        lora_rank = 2
        {of_model}
        [kept]
        prompts = '{tmp_path / "prompts.txt"}'
        count = 4
        [pictures]
        size = 64
        step = 16
        [train]
        steps = 2
        batch_size = 2
        [tune]
        terms = {{ adversarial = 0.1, reconstruction = 1.0, keep = 1.0 }}
        {of_tune}
        """
    )
    config, own, run = str(tmp_path / "c.toml"), str(tmp_path / "own"), tmp_path / "run"
    assert main(["cache", config, "--images", str(tmp_path / "pictures"), "--out", own]) == 0
    assert main(["train", config, "--data", own, "--out", str(run), "--no-preflight"]) == 0
    _, description = read_lora(run / "student.safetensors")
    assert description["sigmas"] == pytest.approx(levels, rel=1e-3)
    assert (description["sampler"], description["cfg"]) == (sampler, cfg)
    assert f"with {sampler}, cfg {cfg:g}" in capsys.readouterr().out
    kept = LatentDataset(run / "kept")
    assert kept.state_sigmas == pytest.approx(levels, rel=1e-3) and kept.manifest()["guidance"] == cfg
    logs = RunFolder(run).logs()
    assert {"adversarial", "reconstruction"} <= logs[0].keys() and "keep" in logs[1]
    assert logs[1]["keep"] < 0.1 * logs[0]["reconstruction"] < 10
    sample = [
        "sample",
        config,
        "--lora",
        str(run / "student.safetensors"),
        "--count",
        "1",
        "--out",
        str(tmp_path / "x"),
    ]
    (tmp_path / "c.toml").write_text(
        (tmp_path / "c.toml").read_text()
        + f"[prompts]\nprompts = '{tmp_path / 'prompts.txt'}'\n[cache]\nsizes = [[8, 8]]"
    )
    assert main(sample) == 0 and (tmp_path / "x" / "00000.png").exists()
