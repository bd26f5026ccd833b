"""Turbo Sampler on the mini model with a LoRA in the server gives the latents of the headless sampler."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from server import failure_text

from distill_core.diffusion.samplers import sample
from distill_core.files import read_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser
from distill_core.models.mini import mini_backend, mini_conditioning
from distill_core.presets.recipe import student_levels

SCALE, SHIFT = 1.5305, 0.0609  # the host's units of SD3 latents: x / SCALE + SHIFT
SEED, CLASS, BATCH = 11, 9, 3


@pytest.fixture(scope="module")
def student(host):
    """The shipped student, its file's name in the server, and what the file says of itself."""
    state, description = read_lora(mini.ASSETS / "student.safetensors")
    backend = mini_backend()
    path = backend.new_lora(rank=next(iter(state.values())).shape[0])
    path.load_export(state)
    lora = host.add_model("loras", mini.ASSETS / "student.safetensors", "mini-student.safetensors")
    return Denoiser(backend, path), lora, description


def graph(lora: str, **sampling) -> dict:
    """Mini model with the LoRA, Turbo Sampler on "auto", the latent saved."""
    choice = (
        dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=SEED, sampler="of the preset", cfg=0.0)
        | sampling
    )
    inputs = {"model": ["2", 0], "positive": ["3", 0], "latent_image": ["4", 0], **choice}
    name = mini.CLASS_NAMES[CLASS]
    return {
        "1": {"class_type": "TurboDistillLoadMiniModel", "inputs": {"distilled": False}},
        "2": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": lora, "strength_model": 1.0},
        },
        "3": {"class_type": "TurboDistillMiniConditioning", "inputs": {"class_name": name}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": BATCH}},
        "5": {"class_type": "TurboDistillSampler", "inputs": inputs},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "student"}},
    }


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_node_gives_the_latents_of_the_headless_sampler(host, student, steps):
    denoiser, lora, description = student
    entry = host.run(graph(lora, steps=steps))
    saved = entry["outputs"]["6"]["latents"][0]
    node = load_file(host.base_dir / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
    cond = mini_conditioning()[0][[CLASS] * BATCH]
    levels = student_levels(description["sigmas"], steps)
    sampler = description["sampler"]
    headless = sample(
        denoiser, denoiser.process, levels, cond, mini.LATENT_SHAPE, seed=SEED, items=range(BATCH), sampler=sampler
    )
    assert node.shape == headless.shape
    torch.testing.assert_close(node, headless / SCALE + SHIFT, rtol=0, atol=1e-5)


def test_the_node_tells_the_user_what_is_wrong(host, student):
    entry = host.wait(host.queue(graph(student[1], steps=5)))
    assert "ValueError: this file was trained at 4 noise levels, so steps must be 1-4" in failure_text(entry)
    entry = host.wait(host.queue(graph(student[1], denoise=0.0)))
    assert "ValueError: denoise must be above 0" in failure_text(entry)
