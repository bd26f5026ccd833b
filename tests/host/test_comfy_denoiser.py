"""Models of the host as backends to train on, in the host's own Python (probe_gradients.py, probe_training.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from server import run_probe

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.models import mini
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Cond, Denoiser

PROBES = ("gradients", "training")
LOADED = ["sd3", "flux-schnell", "flux", "flux2", "wan", "sd15"]  # by the host's loaders
FAMILIES = [*LOADED, "lumina", "qwen-image", "sdxl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for name in ("gradients", "training"):
        run_probe(f"probe_{name}.py", folder)
    return folder


@pytest.fixture(scope="module")
def probe(folder) -> dict:
    return {
        k: v for name in ("gradients", "training") for k, v in json.loads((folder / f"{name}.json").read_text()).items()
    }


# Gradients.


@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_gradient_is_right(probe, family, mode):
    """LADD's student loss, in float64, against five-point finite differences."""
    assert probe["gradients"][f"{family} {mode}"] < 1e-3


def test_cores_trainer_is_silently_wrong_on_flux_at_its_default(probe):
    """The same measure; if this fails the host has been mended, and the note in the documentation should go."""
    core = probe["gradients_of_core"]
    assert core["flux default depth"] > 1e-2 and core["sd3 default depth"] < 1e-3
    for family in ("flux", "flux2"):
        assert "modified by an inplace operation" in core[f"{family} no checkpointing"]


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_compiled_blocks_have_the_same_gradients(probe, family):
    """A graph serves several blocks: a block has two views, forwards with a gradient and recomputes."""
    output, gradient, graphs, blocks = probe["compiled"][family]
    assert output < 1e-5 and gradient < 1e-3 and 0 < graphs <= 4 * blocks


def test_taps_of_in_place_blocks_are_separate(probe):
    for found in probe["separate_taps"].values():
        assert found == {"guarded": False, "bare": True}, "without the guard both taps are one buffer"


# The teacher is the model as it is sampled.


def test_the_teacher_is_the_model_as_the_host_samples_it(probe):
    """Nine families; LoRAs, sampling patches, guidance, reference latents and sizes respected."""
    cases = probe["same_as_sampling"]
    assert {name: found for name, found in cases.items() if not found["difference"] < 3e-6} == {}
    assert {name.split()[0] for name in cases} == set(FAMILIES)
    assert all(found["from plain"] > 1e-3 for name, found in cases.items() if not name.endswith(" plain"))


def test_the_teachers_grid_is_the_models(probe):
    grids = probe["shift_of_the_teacher"]
    for found in grids.values():
        assert found["ours"] == pytest.approx(found["host's"], abs=1e-5)
    assert grids["own"]["ours"] != pytest.approx(grids["patched"]["ours"], abs=1e-2)


@pytest.mark.parametrize("family", ["sd3", "flux", "lumina", "qwen-image", "sd15"])
def test_texts_of_different_lengths_share_a_batch(probe, family):
    found = probe["mixed_texts"][family]
    assert found["rows"] == 3 and max(found["output"], found["joined"], found["features"]) < 3e-6
    assert found["one forward"]


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_the_image_in_its_place(probe, family):
    """A change in the lower left corner of a latent moves the first block's map there most."""
    check_place(probe["features_are_the_image"][family], family)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen-image"])
def test_maps_are_the_image_beside_reference_latents(probe, family):
    """The same in the last block's map, which the reference has changed."""
    found = probe["features_beside_a_reference"][family]
    check_place(found, family)
    assert found["effect"] > 1e-3


def check_place(found: dict, family: str) -> None:
    _, _, height, width = found["shape"]
    assert (height, width) in ((4, 6), (8, 12))
    row, column = found["corner"]
    assert row >= height - max(1, height // 4) - (family == "flux2") and column <= width // 6


@pytest.mark.parametrize("family", LOADED)
def test_latents_are_scaled_exactly_once(probe, family):
    found = probe["latent_spaces"][family]
    assert found["ndim"] == 4 and found["shape"] and not found["inference"]
    assert found["in"] < 1e-6 and found["out"] < 1e-6
    assert found["scaled"] > 0.3 or family == "flux2", "FLUX.2's autoencoder scales by itself"


# Cost.


def test_the_backbone_runs_as_often_as_in_the_core(probe):
    """Per block of three, the discriminator on the first two: student, fake, real; the third once."""
    assert probe["forwards_of_a_step"]["plain"] == [3, 3, 1]
    assert probe["forwards_of_a_step"]["checkpointed"] == [5, 5, 2], "and once more for each recompute"


def test_a_step_costs_what_it_costs_in_the_core(probe):
    """benchmarks/step_flops.py says 4.55 forwards for the same network, batch and taps."""
    assert probe["flops_of_a_step"] == pytest.approx(4.55, abs=0.1)


def test_there_is_one_copy_of_the_backbone_and_it_goes(probe):
    found = probe["one_copy"]
    assert found["more networks"] == 1 and found["size"] == 1.0 and found["shared"]
    assert found["gone"] and found["loaded during"] == 1 and found["loaded after"] == 0


# Nothing leaks.


@pytest.mark.parametrize("ending", ["finished", "broken"])
@pytest.mark.parametrize("family", ["sd3", "flux", "sd15", "lumina"])
def test_the_host_and_the_model_are_as_before(probe, family, ending):
    found = probe["nothing_leaks"][f"{family} {ending}"]
    assert found == {"changed": [], "same image": True}


def test_a_model_whose_loader_cannot_be_asked_is_copied(probe):
    """Also while another clone's LoRA is in its weights."""
    found = probe["without_a_loader"]
    assert found["patched at that moment"] and found["same afterwards"]
    for name in ("plain", "with a lora"):
        assert found[name]["difference"] < 3e-6 and found[name]["inference tensors"] == 0


# The LoRA file.


@pytest.mark.parametrize("family", [*FAMILIES, "mini"])
def test_core_loads_the_lora_without_a_warning_and_gives_the_students_output(probe, family):
    """Through LoraLoaderModelOnly's way and LoraModelLoader's."""
    found = probe["exported_loras"][family]
    assert found["warnings"] == [] and found["difference"] < 1e-4 and found["effect"] > 5e-3


def diffusers_pipeline(name: str, folder: Path):
    """A pipeline on the same tiny network and its process, without the parts that sampling would need."""
    import diffusers

    if name == "mini":
        absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        none = dict.fromkeys(("scheduler", "vae", *absent))
        return diffusers.StableDiffusion3Pipeline(transformer=mini.load_transformer(), **none), FlowProcess()
    state = load_file(folder / f"{name}_diffusers.safetensors")
    absent = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    if name == "flux-schnell":
        network = diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=128,
            num_attention_heads=1,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=False,
        )
        pipeline = diffusers.FluxPipeline(transformer=network, **dict.fromkeys(absent))
        return with_weights(pipeline, network, state), FlowProcess(1.0)
    network = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=64 + 6 * 256,
    )
    parts = {**dict.fromkeys(absent), "scheduler": diffusers.EulerDiscreteScheduler()}
    pipeline = diffusers.StableDiffusionXLPipeline(unet=network, add_watermarker=False, **parts)
    return with_weights(pipeline, network, state), DiscreteProcess(cumulative_alphas())


def with_weights(pipeline, network, state: dict):
    """All of the network's weights; the host's table has names of its relatives, too."""
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    return pipeline


@pytest.mark.parametrize("name", ["mini", "flux-schnell", "sdxl"])
def test_diffusers_loads_the_same_file_and_gives_the_same_output(probe, folder, name, caplog):
    """The backbone alone differs from the student, and its file brings the student's output into diffusers."""
    import diffusers

    diffusers.utils.logging.enable_propagation()
    pipeline, process = diffusers_pipeline(name, folder)
    expected = load_file(folder / f"student_{name}.safetensors")
    network = pipeline.unet if name == "sdxl" else pipeline.transformer
    teacher = Denoiser(DiffusersBackend(network, process))
    cond = Cond(expected["context"], expected["pooled"])
    with torch.no_grad():
        before = teacher(expected["x"], expected["sigma"], cond)
        caplog.clear()  # what the first import of diffusers in a new environment says is not ours
        pipeline.load_lora_weights(str(folder / f"lora_{name}.safetensors"))
        after = teacher(expected["x"], expected["sigma"], cond)
    assert (before - expected["denoised"]).abs().max() > 1e-2
    assert (after - expected["denoised"]).abs().max() < 1e-4
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in said if "text_encoder" not in text] == [], "the pipeline has no text encoders to patch"


# Mistakes.

MESSAGES = {
    "controlnet": "conditioning with control cannot be trained with",
    "empty conditioning": "connect at least one prompt",
    "no pooled": "lacks 'pooled_output', which this model needs",
    "unlike conditionings": "only some of them have pooled",
    "quantized": "quantized in a way that cannot be trained on",
    "quantized, all weights": "quantized network .joint_blocks.0.x_block.mlp.fc1.weight. cannot be copied",
    "other channels": "4 channels, this model's have 16: encode the images with the model's own VAE",
    "mask": "conditioning with mask cannot be trained with",
    "reference before the image": "reference_latents cannot be trained with on wan",
    "video": "only images can be trained on, not videos of 5",
    "unknown network": "HunYuanDiT network cannot be distilled yet; those that can: .*Qwen-Image",
    "unknown sampling": "a model with x0 sampling .* cannot be distilled",
}


@pytest.mark.parametrize("mistake", MESSAGES)
def test_mistakes_are_explained(probe, mistake):
    assert re.search(MESSAGES[mistake], probe["mistakes"][mistake])
