"""GGUF files opened by ComfyUI-GGUF itself (gguf_pack.py), in the host's Python and in the real server."""

from __future__ import annotations

import json

import pytest
from gguf_pack import PACK, found
from graphs import node
from run_files import fails, log_of
from server import HOST_FOUND, PYTHON, Host, run_probe
from test_quantized import assert_a_lora_has_its_gradient, assert_losses_are_within_noise

pytestmark = pytest.mark.skipif(not (HOST_FOUND and found(PYTHON)), reason="ComfyUI-GGUF not found")


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gguf")
    run_probe("probe_gguf.py", folder)
    return json.loads((folder / "gguf.json").read_text())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_a_lora_on_a_gguf_file_has_the_gradient_of_its_weights_in_full(probe, kind):
    """The pack computes its weights in float16, hence the errors."""
    assert_a_lora_has_its_gradient(probe["gguf"]["found"][kind], 1e-2, 1e-3)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_losses_of_a_run_on_a_gguf_file_are_those_of_bfloat16_within_noise(probe, kind):
    assert_losses_are_within_noise(probe["gguf"]["runs"], kind)


def test_a_gguf_file_is_not_copied_for_training_and_not_trained_in_all_weights(probe):
    assert probe["memory"] == {"same": True, "inference": [False, True]}
    assert "quantized network" in probe["all_weights"] and "load a file in bfloat16" in probe["all_weights"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_the_plan_counts_what_making_weights_in_full_takes(probe, kind):
    planned, measured = probe["planned"][kind]
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    server = Host(tmp_path_factory.mktemp("comfyui_gguf"), PACK)
    try:
        run_probe("probe_gguf_file.py", server.base_dir / "models" / "unet", "Q4_K")
        server.start()
        yield server
    finally:
        server.stop()


def graph(**trainer) -> dict:
    prompts = dict(width=64, tokens=5, pooled=64)
    teacher = dict(model=["base", 0], positive=["prompts", 0], dataset_name="gguf", count=8, sizes="64x64", steps=2)
    training = dict(model=["base", 0], dataset=["dataset", 0], run_name="gguf", target_steps=1, steps=2, batch_size=2)
    return {
        "base": node("UnetLoaderGGUF", unet_name="Q4_K.gguf"),
        "prompts": node("TestRandomConditioning", **prompts, count=2, seed=1),
        "dataset": node("TurboDistillTeacherLatents", **teacher, cfg=1.0, pairs_for_steps=1, batch_size=4),
        "train": node("TurboDistillLADDTrainer", **(training | {"rank": 4} | trainer)),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix="loras/gguf"),
    }


def test_a_gguf_model_is_distilled_in_the_server_and_its_lora_loads(host):
    host.run(graph(), 600)
    assert [entry["step"] for entry in log_of(host, "gguf")] == [1, 2]
    before = len(host.log())
    sampling = dict(preset="auto", steps=1, denoise=1.0, denoise_mode="snap", seed=1, sampler="of the preset", cfg=0.0)
    loaded = {
        "base": node("UnetLoaderGGUF", unet_name="Q4_K.gguf"),
        "model": node(
            "LoraLoaderModelOnly", model=["base", 0], lora_name="gguf_00001_.safetensors", strength_model=1.0
        ),
        "prompts": node("TestRandomConditioning", width=64, tokens=5, pooled=64, count=1, seed=1),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    }
    loaded["sample"] = node(
        "TurboDistillSampler", model=["model", 0], positive=["prompts", 0], latent_image=["latent", 0], **sampling
    )
    loaded["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="gguf")
    host.run(loaded, 300)
    said = host.log()[before:]
    assert "lora key not loaded" not in said and "NOT LOADED" not in said


def test_all_weights_of_a_gguf_model_are_refused_in_the_server(host):
    assert "a quantized network" in fails(host, graph(run_name="gguf_full", train="all weights", rank=0))
