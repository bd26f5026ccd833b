"""The settings of a turbo LoRA, whatever is loaded before or after it (probe_loras.py)."""

from __future__ import annotations

import json

import pytest
from server import run_probe

TURBO, FAMILY = [1.0, 0.6, 0.3, 0.0], [1.0, 0.9, 0.75, 0.5, 0.0]


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("loras")
    run_probe("probe_loras.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.case("sampling 4", "a turbo LoRA keeps its settings wherever it stands among other LoRAs")
@pytest.mark.case("sampling D4", "a LoRA with any metadata, loaded after the turbo LoRA, does not hide its settings")
@pytest.mark.case("host D1", "a style LoRA after the turbo LoRA does not change the levels")
@pytest.mark.parametrize(
    "stack", ["turbo", "turbo, kohya", "kohya, turbo", "turbo, plain", "turbo, kohya, plain, kohya"]
)
def test_a_turbo_lora_is_found_in_any_stack(probe, stack):
    assert probe[stack]["loras"] == [["turbo.safetensors", 1, 1.0]]
    assert probe[stack]["sigmas"] == pytest.approx(TURBO)
    assert "turbo.safetensors" in probe[stack]["text"], "it says whose settings these are"


def test_its_strength_is_known(probe):
    assert probe["turbo at .8, kohya"]["loras"] == [["turbo.safetensors", 1, pytest.approx(0.8)]]


def test_differences_of_all_weights_are_found_too(probe):
    assert probe["differences, kohya"]["sigmas"] == pytest.approx([1.0, 0.8, 0.0])


def test_two_turbo_loras_are_a_question(probe):
    error = probe["two turbos"]["error"]
    assert "turbo.safetensors" in error and "other turbo.safetensors" in error and "choose a preset" in error


def test_two_of_the_same_levels_are_none(probe):
    assert probe["two turbos of the same levels"]["sigmas"] == pytest.approx(TURBO)


@pytest.mark.case("sampling D5", "a LoRA of which no layer fitted is not followed, and that is said")
@pytest.mark.case("sampling 14", "a turbo LoRA made for another model does not set the levels of this one")
def test_a_lora_that_does_not_fit_is_not_followed(probe):
    flux, sd15 = probe["turbo on flux"], probe["turbo on sd15"]
    assert flux["loras"] == [["turbo.safetensors", 1, 1.0]], "a layer of FLUX has the same name"
    assert sd15["loras"] == [["turbo.safetensors", 0, 0.0]]
    for found in (flux, sd15):  # neither family alone says how it was distilled
        assert "turbo.safetensors was made for sd3, and this model is" in found["error"]


def test_without_a_turbo_lora_the_family_decides(probe):
    assert probe["kohya"]["sigmas"] == probe["nothing"]["sigmas"] == pytest.approx(FAMILY)
    assert probe["kohya"]["loras"] == []
    assert "by the model's family alone" in probe["kohya"]["text"], "a guess is said"


def test_a_file_that_is_gone_still_counts_while_its_metadata_is_the_last(probe):
    assert probe["removed"]["sigmas"] == pytest.approx([1.0, 0.7, 0.0])


def test_the_doctor_names_two_that_disagree(probe):
    assert "two_turbo_loras" in probe["doctor"]
