"""Turbo Sampler on the mini model with a LoRA in the server gives the latents of the headless sampler."""

from __future__ import annotations

import pytest
import torch
from graphs import node as node_of
from safetensors.torch import load_file
from server import failure_text

from distill_core.diffusion.samplers import sample
from distill_core.lora_files import read_lora
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
    with pytest.raises(AssertionError, match="Value 0.0 smaller than min of 0.01"):
        host.queue(graph(student[1], denoise=0.0))


@pytest.mark.case("sampling D11", "Turbo Sampler says on its node what the Doctor would: another timestep multiplier")
def test_the_sampler_warns_where_the_doctor_would(host, student):
    _, lora, _ = student
    wrong = graph(lora) | {"7": {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["2", 0], "shift": 1.0}}}
    wrong["5"]["inputs"]["model"] = ["7", 0]
    (text,), (right,) = (host.run(each)["outputs"]["5"]["text"] for each in (wrong, graph(lora)))
    assert "ERROR: " in text and "another timestep multiplier" in text and "remove the node" in text
    assert "ERROR" not in right and "WARNING" not in right


@pytest.mark.case("host D13", "an empty mask is said on the sampler's node; the workflow has a mask that is not empty")
def test_an_empty_mask_is_said(host):
    graph = {
        "mini": node_of("TurboDistillLoadMiniModel", distilled=True),
        "class": node_of("TurboDistillMiniConditioning", class_name="bag"),
        "latent": node_of("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "mask": node_of("SolidMask", value=0.0, width=64, height=64),
        "masked": node_of("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0]),
        "sampler": node_of(
            "TurboDistillSampler",
            model=["mini", 0],
            positive=["class", 0],
            latent_image=["masked", 0],
            preset="auto",
            steps=1,
            denoise=1.0,
            denoise_mode="snap",
            seed=0,
            sampler="of the preset",
            cfg=0.0,
        ),
        "save": node_of("SaveLatent", samples=["sampler", 0], filename_prefix="masked"),
    }
    said = lambda: host.run(graph)["outputs"]["sampler"]["text"][0]  # noqa: E731
    assert "the mask is empty" in said()
    graph["mask"]["inputs"]["value"] = 1.0
    assert "mask" not in said()


def test_a_teacher_at_its_own_levels_is_not_warned_of(host):
    """Levels and cfg that the user chose on a model that names no distillation; a fault of the model is still said."""
    graph = {
        "mini": node_of("TurboDistillLoadMiniModel", distilled=False),
        "class": node_of("TurboDistillMiniConditioning", class_name="bag"),
        "none": node_of("TurboDistillMiniConditioning", class_name="none"),
        "latent": node_of("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "levels": node_of("BasicScheduler", model=["mini", 0], scheduler="simple", steps=6, denoise=1.0),
        "sampler": node_of(
            "TurboDistillSampler",
            model=["mini", 0],
            positive=["class", 0],
            negative=["none", 0],
            latent_image=["latent", 0],
            sigmas=["levels", 0],
            preset="auto",
            steps=0,
            denoise=1.0,
            denoise_mode="snap",
            seed=0,
            sampler="euler",
            cfg=1.5,
        ),
        "save": node_of("SaveLatent", samples=["sampler", 0], filename_prefix="own_levels"),
    }
    said = lambda: host.run(graph)["outputs"]["sampler"]["text"][0]  # noqa: E731
    text = said()
    assert "WARNING" not in text and "ERROR" not in text, text
    graph["broken"] = node_of("ModelSamplingAuraFlow", model=["mini", 0], shift=1.73)
    graph["sampler"]["inputs"]["model"] = ["broken", 0]
    assert "ERROR" in said()


@pytest.mark.case("host limitation: KSampler", "Turbo Preset says which settings of KSampler give a student's levels")
def test_the_preset_says_how_ksampler_gets_the_levels(host):
    """With the shift that the student was trained at; without it no scheduler gives them, and nothing is said."""
    name = host.add_model("loras", mini.ASSETS / "student.safetensors", "mini-student.safetensors")
    graph = {
        "mini": node_of("TurboDistillLoadMiniModel", distilled=False),
        "shifted": node_of("ModelSamplingSD3", model=["mini", 0], shift=1.0),
        "lora": node_of("LoraLoaderModelOnly", model=["shifted", 0], lora_name=name, strength_model=1.0),
        "preset": node_of(
            "TurboDistillPreset", model=["lora", 0], preset="auto", steps=0, denoise=1.0, denoise_mode="snap"
        ),
        "show": node_of("PreviewAny", source=["preset", 3]),
    }
    said = lambda: host.run(graph)["outputs"]["show"]["text"][0]  # noqa: E731
    text = said()
    assert "KSampler: sampler_name euler_ancestral, scheduler simple, steps 4, cfg 1" in text, text
    graph["shifted"]["inputs"]["shift"] = 3.0
    assert "KSampler" not in said()
