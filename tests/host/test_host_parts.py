"""VAEs and CLIP_VISIONs of the host as what ADD learns through, and what each phase of the two methods trains there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from server import run_probe

from distill_core.models import mini
from distill_core.models.vision import encoder_vision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Filled by probe_parts.py."""
    folder = tmp_path_factory.mktemp("parts")
    run_probe("probe_parts.py", folder)
    return folder


@pytest.fixture(scope="module")
def probe(folder) -> dict:
    return json.loads((folder / "parts.json").read_text())


@pytest.mark.parametrize("name", ["mini", "taesd", "kl"])
def test_the_decoder_is_the_hosts_with_a_gradient(probe, name):
    """The mini model's VAE, core's taesd from two files, a KL one: images, gradient, and the VAE itself as it was."""
    found = probe["decoders"][name]
    assert found["image"] < 1e-4 and found["shape"] == [2, 3, 32, 48]
    assert found["slope"] < 1e-4 and found["checkpointed"] < 1e-4
    assert found["frozen"] and found["untouched"]
    assert found["encoder"] == (name != "kl") and found["rows"] == (name == "kl")


def test_the_tiny_encoder_sees_what_the_headless_one_does(probe, folder):
    stored, autoencoder = load_file(folder / "mini_tokens.safetensors"), mini.load_autoencoder()
    with torch.no_grad():
        images = autoencoder.decode(stored["x"]).sample
        tokens = encoder_vision(autoencoder.encoder, (32, 32))(stored["images"])
    torch.testing.assert_close(stored["images"], images, rtol=0, atol=1e-5)
    assert probe["mini_tokens"]["taps"] == len(tokens)
    for i, ours in enumerate(tokens):
        torch.testing.assert_close(stored[f"tokens{i}"], ours, rtol=0, atol=1e-5)


def test_plain_attention_is_the_hosts_and_twice_differentiable(probe):
    found = dict(probe["attention"])
    assert found.pop("double backward") and len(found) == 7
    assert all(isinstance(difference, float) and difference < 1e-5 for difference in found.values()), found


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "clip"])
def test_a_clip_vision_is_tapped_with_a_gradient(probe, kind):
    """Of core's loader: the last tap is what the host's own forward has there, the class token on every patch."""
    found = probe["visions"][kind]
    assert found["tokens"] < 1e-5 and found["frozen"] and found["gradient"] > 0
    assert [int(tap.rpartition(".")[2]) for tap in found["taps"]] == [5, 11, 17, 23]
    patches = {"dinov2": (28 // 14) ** 2, "dinov3": (32 // 16) ** 2, "clip": (224 // 14) ** 2}[kind]
    assert found["shapes"] == [[2, 64, patches]] * 4


@pytest.mark.parametrize("name", ["add", "add with dinov2", "diffusion2gan lora", "diffusion2gan copy"])
def test_each_phase_trains_its_own_player(probe, name):
    """Neither the backbone nor the VAE, the vision network or the metric has a gradient, or moves in a step."""
    found = probe["gradients"][name]
    assert found["generator"] == ["generator"] and found["discriminator"] == ["discriminator"]
    assert found["moved"] == ["discriminator", "generator"]


def test_a_finished_run_is_found_for_the_same_question_only(probe):
    found = probe["identities"]
    assert found["same"] and found["add"] == [6, 6] and found["diffusion2gan"] == [4, 4]
    assert probe["finished"]["method"] == "ADD" and probe["finished"]["losses"] == 2
    assert "belongs to a run with other settings (vision_size is" in probe["finished"]["other size"]


MISTAKES = {
    "video": "this VAE is for videos or sound, not for single images",
    "empty": "this one is empty (a checkpoint without a VAE)",
    "channels": "the VAE decodes latents of 4 channels, this model's have 16",
    "no vision": "connect clip_vision (Load CLIP Vision with a DINOv2), or as vae a tiny one (TAESD)",
    "patch": "vision_size 32 must be a multiple of this clip_vision's patch, 14",
    "fixed size": "this clip_vision only takes images of 224 px",
    "no gradient": "the autoencoder gives no gradients",
    "other latents": "perceptual is for latents of 4 channels, this model's have 16",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_part_is_named_before_training(probe, mistake):
    assert MISTAKES[mistake] in probe["mistakes"][mistake]
    assert probe["mistakes"]["left over"] == []
