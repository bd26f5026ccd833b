"""Quantized networks in the host's own Python (probe_quantized.py)."""

from __future__ import annotations

import json
import statistics

import pytest
from server import run_probe


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("quantized")
    run_probe("probe_quantized.py", folder)
    return json.loads((folder / "quantized.json").read_text())


def assert_a_lora_has_its_gradient(found: dict, whole: float, layer: float) -> None:
    """whole: the most that output and gradients of the network may differ from those on the weights in full.

    layer: the same for the gradient of one layer, which gives bit for bit the same with a gradient and without.
    """
    assert found["layers"][0] == found["layers"][1] > 10
    assert max(found["out"], found["x"], found["lora"]) < whole
    assert found["same"] and found["grad"] < layer and found["twice"] < layer


def assert_losses_are_within_noise(runs: dict, kind: str) -> None:
    """Noise: the spread of the same losses over seeds of a run on the weights in bfloat16."""
    for step, loss in enumerate(runs[kind]):
        seeds = [run[step] for run in runs["bfloat16"]]
        assert abs(loss - seeds[0]) < statistics.stdev(seeds)


# On this CPU the host multiplies by the weight in full, except in formats whose kernels round their input, to 8 bits or
# to 4: then the output itself is another. On a card that has the format it rounds the input of all of them.
ROUNDED = {"int8_tensorwise": 1e-2, "asym_w4a8_int8": 1e-2, "convrot_w4a4": 0.2}
ROUNDED |= {"float8_e4m3fn on a card": 0.05, "nvfp4 on a card": 0.2}
FORMATS = ["float8_e4m3fn", "nvfp4", "mxfp8", *ROUNDED]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_on_each_format_of_the_host_has_the_gradient_of_its_weights_in_full(probe, kind):
    assert_a_lora_has_its_gradient(probe["host_formats"]["found"][kind], ROUNDED.get(kind, 1e-5), 1e-6)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "card" not in kind])
def test_losses_of_a_run_on_each_format_are_those_of_bfloat16_within_noise(probe, kind):
    assert_losses_are_within_noise(probe["host_formats"]["runs"], kind)


@pytest.mark.case(
    "memory 5.3", "a scaled-fp8 file is trained on: the LoRA's gradient is that of the same float32 weights"
)
def test_a_lora_on_scaled_fp8_has_the_gradient_of_the_same_weights(probe):
    found = probe["scaled_fp8"]
    assert any("MixedPrecisionOps" in kind for kind in found["kinds"])
    assert found["layers"][0] == found["layers"][1] > 10
    assert found["out"] < 1e-2 and found["x"] < 1e-2 and found["lora"] < 1e-2


@pytest.mark.case(
    "memory 5.5", "a model set to multiply in fp8 is trained without, so features do not tell real from fake"
)
def test_a_copy_does_not_multiply_in_fp8(probe):
    found = probe["fast_fp8"]
    assert found["fast in MODEL"] > 10 and found["fast in copy"] == 0
    assert found["ordinary in copy"] == found["fast in MODEL"]


@pytest.mark.case("memory 5.2", "a network whose state shows stand-ins without data (GGUF) is known by its parameters")
def test_a_model_is_known_by_what_lies_in_memory(probe):
    assert probe["stand_ins"] == {"same": True, "meta": True}


def test_a_lora_on_a_network_as_a_gguf_loader_gives_it(probe):
    """A stand-in for that pack's layers, which say another shape than their bytes have."""
    found = probe["gguf"]
    assert found["quantized"] > 10 and found["identity"]
    assert found["out"] < 1e-2 and found["x"] < 1e-2 and found["lora"] < 1e-2
