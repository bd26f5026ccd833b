"""Tune Turbo and De-Distil Adapter in the real server: own pictures into the mini turbo at its own steps."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from graphs import node
from run_files import assert_same_files, check_cancelled_run, fails, log_of, lora_of, run_folder, steps_of
from safetensors.torch import load_file
from server import Host, run_probe

from distill_core.data.dataset import LatentDataset
from distill_core.lora_files import read_lora

LEVELS = [1.0, 0.75, 0.5, 0.25]  # of the shipped turbo, sampled with the sampler ancestral
TO_KEEP = ("trouser", "dress", "sneaker")
MINI = {"turbo": node("TurboDistillLoadMiniModel", distilled=True)}
KEPT = {
    "words": node("TurboDistillPrompts", prompts="\n".join(TO_KEEP), file="none"),
    "kept": node("CLIPTextEncode", text=["words", 0], clip=["turbo", 2]),
}
BOOT = {"boot": node("TurboDistillMiniConditioning", class_name="ankle boot")}
LOOP = dict(batch_size=4, student_lr=6e-4, discriminator_lr=4e-3, rank=4, gradient_checkpointing=False)


def trained(kind: str, run_name: str, **trainer) -> dict:
    """The mini turbo -> a trainer -> Save Turbo LoRA; None: not connected."""
    settings = dict(model=["turbo", 0], run_name=run_name, keep_count=12, steps=4, **LOOP)
    given = {key: value for key, value in (settings | trainer).items() if value is not None}
    return (
        MINI
        | KEPT
        | BOOT
        | {
            "train": node(f"TurboDistill{kind}Trainer", **given),
            "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{run_name}"),
        }
    )


def tuning(run_name: str, **trainer) -> dict:
    """The example pictures -> Tune Turbo."""
    pictures = dict(folder="example pictures (shipped)", dataset_name="own", size=64, step=16, dtype="float32")
    parts = {"model": ["turbo", 0], "vae": ["turbo", 1], "clip": ["turbo", 2]}
    graph = trained("Tune", run_name, **(dict(dataset=["own", 0], keep_positive=["kept", 0]) | trainer))
    return graph | {"own": node("TurboDistillPictureFolder", **parts, **pictures)}


def adapter(run_name: str, **trainer) -> dict:
    return trained("Adapter", run_name, **(dict(positive=["kept", 0], sizes="64x64") | trainer))


def kept_folders(host: Host) -> list[Path]:
    return sorted((host.base_dir / "output" / "turbo_distill" / "datasets").glob("kept_*"))


def sampled(lora: str, **sampling) -> dict:
    """A file on the mini turbo by core's loader, sampled by Turbo Sampler as it says itself."""
    choice = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=1, sampler="of the preset", cfg=0.0)
    wired = dict(model=["tuned", 0], positive=["boot", 0], latent_image=["empty", 0])
    return (
        MINI
        | BOOT
        | {
            "tuned": node("LoraLoaderModelOnly", model=["turbo", 0], lora_name=lora, strength_model=1.0),
            "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
            "sample": node("TurboDistillSampler", **wired, **(choice | sampling)),
            "keep": node("SaveLatent", samples=["sample", 0], filename_prefix="tuned"),
        }
    )


def latents_of(host: Host, graph: dict) -> tuple[torch.Tensor, str]:
    """What `sampled` makes, and what the sampler says."""
    outputs = host.run(graph, 120)["outputs"]
    (file,) = outputs["keep"]["latents"]
    made = load_file(host.base_dir / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
    return made, "".join(outputs["sample"]["text"])


@pytest.fixture(scope="module")
def tuned(host) -> tuple[Host, dict]:
    """The mini turbo tuned for a few steps, and what the node's last look was."""
    graph = tuning("tuned", steps=6, vae=["turbo", 1], preview_positive=["boot", 0])
    graph["merged"] = node(
        "TurboDistillSaveLora", lora=["train", 1], filename_prefix="loras/tuned_merged", merge_upstream=True
    )
    return host, host.run(graph, 300)["outputs"]


@pytest.mark.case("training 5", "a turbo is tuned at its own levels with its own sampler, and the node says where from")
def test_the_node_says_which_turbo_it_is_and_why(tuned):
    host, outputs = tuned
    (said,) = outputs["train"]["text"]
    assert "trained as the turbo is sampled: 4 steps: 1, 0.75, 0.5, 0.25, 0" in said
    assert "sampler ancestral; cfg 1" in said and "Source: " in said
    _, described = read_lora(lora_of(host, "tuned"))
    assert described["sigmas"] == LEVELS and described["sampler"] == "ancestral" and described["cfg"] == 1.0
    assert described["method"] == "Tune Turbo" and described["steps"] == 6 and len(described["below"]) == 1
    assert described["config"]["train"]["betas"] == [0.9, 0.99], "no term is adversarial"


def test_own_and_kept_batches_take_turns(tuned):
    host, _ = tuned
    log = log_of(host, "tuned")
    kept, own = [e for e in log if "keep" in e], [e for e in log if "denoising" in e]
    assert (len(kept), len(own)) == (2, 4) and not [e for e in log if {"keep", "denoising"} <= e.keys()]


def test_cores_loader_takes_the_lora_and_turbo_sampler_samples_it_at_the_turbos_own_steps(tuned):
    host, _ = tuned
    before = len(host.log())
    made, said = latents_of(host, sampled("turbo_distill/tuned.safetensors"))
    plain = sampled("turbo_distill/tuned.safetensors") | {"tuned": MINI["turbo"]}
    turbo, _ = latents_of(host, plain)
    assert "4 steps: 1, 0.75, 0.5, 0.25, 0" in said and "ancestral" in said and "WARNING" not in said
    assert "lora key not loaded" not in host.log()[before:] and "NOT LOADED" not in host.log()[before:]
    assert made.shape == turbo.shape and torch.isfinite(made).all() and not torch.equal(made, turbo)


def test_one_file_with_the_turbo_lora_gives_the_same_pictures_on_the_base(tuned):
    host, _ = tuned
    made, _ = latents_of(host, sampled("turbo_distill/tuned.safetensors"))
    graph = sampled("tuned_merged_00001_.safetensors")
    graph["turbo"] = node("TurboDistillLoadMiniModel", distilled=False)
    merged, said = latents_of(host, graph)
    assert "4 steps: 1, 0.75, 0.5, 0.25, 0" in said and "WARNING" not in said
    torch.testing.assert_close(merged, made, rtol=1e-3, atol=1e-3)


def test_the_report_shows_before_and_after_of_own_and_of_kept_prompts(tuned):
    """One prompt of own pictures and three to keep, at the turbo's steps: two pictures of each under the curves."""
    from PIL import Image

    host, outputs = tuned
    with Image.open(run_folder(host, "tuned") / "report.png") as picture:
        rows = (picture.height - 480) / (128 + 4)
    assert 4.2 < rows < 4.6, "four rows, and the titles of two grids"
    assert json.loads((run_folder(host, "tuned") / "started.json").read_text())["tunes"] is True


def test_another_run_finds_the_turbos_samples_there(tuned):
    host, _ = tuned

    def shards() -> dict[Path, int]:
        """Of all datasets with states, this test's and others'."""
        states = [folder for folder in kept_folders(host) if LatentDataset(folder).state_sigmas]
        return {path: path.stat().st_mtime_ns for folder in states for path in folder.glob("shard-*")}

    before, folders = shards(), kept_folders(host)
    assert any(list(LatentDataset(f).state_sigmas) == LEVELS and len(LatentDataset(f)) == 12 for f in folders)
    host.run(tuning("tuned_again", student_lr=1e-4, steps=2), 120)
    assert shards() == before and kept_folders(host) == folders


def test_without_kept_prompts_nothing_is_sampled(tuned):
    host, _ = tuned
    before = kept_folders(host)
    host.run(tuning("nothing_kept", keep_share=0.0, keep_positive=None, steps=2), 120)
    assert kept_folders(host) == before and all("denoising" in entry for entry in log_of(host, "nothing_kept"))


def test_a_cancelled_run_goes_on_to_the_same_weights(host):
    check_cancelled_run(host, tuning)


def test_a_killed_server_loses_neither_the_turbos_samples_nor_the_run(host, tmp_path):
    """Killed while the turbo samples, then while it trains; the end is that of a run that nobody disturbed."""
    graph = tuning("killed", steps=12, keep_count=60, checkpoint_every=4, seed=2)
    other = Host(tmp_path / "comfyui")

    def killed(is_time) -> None:
        other.start()
        other.queue(graph)
        end = time.monotonic() + 300
        while not is_time():
            other.check_alive()
            assert time.monotonic() < end, other.log()[-3000:]
            time.sleep(0.01)
        other.process.kill()
        other.process.wait()

    try:
        whole = "output/turbo_distill/datasets/kept_*/shard-?????.safetensors"
        killed(lambda: any(other.base_dir.glob(whole)))
        (folder,) = kept_folders(other)
        there = {path.name: path.read_bytes() for path in folder.glob("shard-?????.safetensors")}
        assert there and steps_of(other, "killed") == []
        killed(lambda: len(steps_of(other, "killed")) >= 6)
        assert all((folder / name).read_bytes() == content for name, content in there.items())
        other.start()
        other.run(graph, 300)
        assert steps_of(other, "killed") == list(range(1, 13))
    finally:
        other.stop()
    host.run(graph, 300)
    assert_same_files(lora_of(other, "killed"), lora_of(host, "killed"))


MISTAKES = {
    "nothing to keep is named": (dict(keep_positive=None), "connect clip, which encodes those that come with the pack"),
    "steps the turbo was not made for": (dict(turbo_steps=7), "steps must be 1-4"),
    "a preset of another family": (dict(preset="sdxl-turbo"), "preset sdxl-turbo is for sd21 or sdxl"),
    "a turbo with guidance": (dict(preset="hyper-sd3-lora", turbo_steps=4), "needs the empty prompt: connect clip"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_sampled(host, mistake):
    change, message = MISTAKES[mistake]
    name, before = mistake.replace(" ", "_"), kept_folders(host)
    assert message in fails(host, tuning(name, **change))
    assert kept_folders(host) == before and not lora_of(host, name).exists()


def test_an_adapter_is_made_of_the_turbos_samples_alone(host):
    host.run(adapter("an_adapter"), 120)
    assert len(log_of(host, "an_adapter")) == 4
    assert all(entry.keys() >= {"step", "denoising"} for entry in log_of(host, "an_adapter"))
    assert not [entry for entry in log_of(host, "an_adapter") if {"adversarial", "keep"} & entry.keys()]
    state, said = read_lora(lora_of(host, "an_adapter"))
    assert any(value.any() for name, value in state.items() if "lora_B" in name) and said["steps"] == 4
    assert said["method"] == "Training adapter"


def test_an_adapter_is_on_while_training_and_off_afterwards(host):
    """A LoRA that hardly learns: its losses are those of another network, and its pictures the turbo's."""
    host.run(adapter("strong_adapter", student_lr=0.05), 120)
    ordinary = dict(keep_share=0.0, denoising_levels="all", student_lr=1e-9, steps=2)
    host.run(tuning("without", **ordinary), 120)
    graph = tuning("over", adapter="turbo_distill/strong_adapter.safetensors", **ordinary)
    (said,) = host.run(graph, 120)["outputs"]["train"]["text"]
    assert "trained over the adapter turbo_distill/strong_adapter.safetensors" in said
    _, described = read_lora(lora_of(host, "over"))
    assert described["adapter"] == "strong_adapter.safetensors"
    losses = [log_of(host, name)[0]["denoising"] for name in ("without", "over")]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0], "the same network, the same noise"
    made, _ = latents_of(host, sampled("turbo_distill/over.safetensors"))
    turbo, _ = latents_of(host, sampled("turbo_distill/over.safetensors") | {"tuned": MINI["turbo"]})
    torch.testing.assert_close(made, turbo, rtol=1e-4, atol=1e-4)


# Other turbos, as tiny networks


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    """What probe_tune.py finds."""
    return json.loads(run_probe("probe_tune.py", tmp_path_factory.mktemp("probe")).splitlines()[-1])


TURBOS = {  # (levels, sampler) as the presets have them
    "flux-schnell": ([1.0, 0.75, 0.5, 0.25], "euler"),
    "sd15": (None, "renoise"),
    "lumina": (None, "euler"),
}


@pytest.mark.parametrize("family", TURBOS)
def test_a_step_trains_at_the_levels_of_the_turbo(probe, family):
    found, (levels, sampler) = probe[family], TURBOS[family]
    assert found["sampler"] == sampler and found["cfg"] == 1.0
    assert found["levels"] == pytest.approx(levels or found["preset"], rel=1e-5)
    assert found["trained"] > 0 and found["finite"] and {"keep", "denoising", "adversarial"} <= set(found["terms"])
    assert found["adapter"] > 0 and found["adapter terms"] == ["denoising"]


@pytest.mark.parametrize("family", TURBOS)
def test_kept_states_are_those_that_the_turbo_visits(probe, family):
    """From each stored state one step of the sampler, with the host's own denoised latent, leads to the next."""
    assert probe[family]["path"] < 1e-4
