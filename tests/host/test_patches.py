"""What nodes before the sampler put on a MODEL or into its conditionings reaches the network (probe_patches.py)."""

from __future__ import annotations

import json

import pytest
from server import run_probe

CASES = {
    "normalized_attention": "the negative prompt of normalized attention guidance works, also at cfg 1",
    "reads_the_negative": "a function after guidance that reads the negative gets it, also at cfg 1",
    "embedding_a_row": "one embedding for each image (IP-Adapter) goes to its image",
    "whole_batch": "a patch that needs the whole batch gets it",
    "mixes_images": "a patch through which images see each other gets the whole batch",
    "control_residuals": "residuals of a ControlNet reach their images",
    "reference_latents": "reference latents reach every image",
    "regions": "prompts for parts of the picture stay in their parts",
}
TOGETHER = ("whole_batch", "mixes_images")  # an image of these cannot be remade alone to the last bit


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("patches")
    run_probe("probe_patches.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.case("sampling 5", "the negative of normalized attention guidance works, for all images of a batch")
@pytest.mark.case(
    "sampling new 9 (Comfy-Org/ComfyUI#12707)",
    "core's NAG node changes the picture on FLUX.2, equally with our sampler",
)
@pytest.mark.case("sampling D3", "a connected negative is never dropped")
@pytest.mark.case("sampling D12", "patches with one embedding a row, or that need the whole batch, work on a CPU")
@pytest.mark.parametrize("case", CASES)
def test_turbo_sampler_gives_what_core_gives_with_the_same_noise(probe, case):
    found = {name: values for name, values in probe["same_as_core"].items() if name.startswith(case)}
    assert len(found) >= 2, "at cfg 1 and 2"
    for name, values in found.items():
        assert values["from core"] < 1e-6, f"{CASES[case]}: {name}"
        assert values["effect"] > 3e-4, f"the patch must do something: {name}"
        if case not in TOGETHER:
            assert values["alone"] == 0.0, f"an image alone is the one in the batch: {name}"


@pytest.mark.case("sampling 17", "a model with a noise scale (HiDream-O1) is sampled right by every sampler")
@pytest.mark.case("sampling D9", "every sampler honours the noise scale of the model")
def test_every_sampler_honours_the_noise_scale_of_a_model(probe):
    assert set(probe["noise_scale"]) == {
        f"{name} {scale}" for name in ("renoise", "euler", "ancestral", "scm", "tcd") for scale in (1, 8)
    }
    assert max(probe["noise_scale"].values()) < 1e-6


@pytest.mark.case(
    "sampling new 10 (Tongyi-MAI/Z-Image#16, ModelTC/LightX2V-Qwen-Image-Lightning#45)",
    "Seed Variety makes images of one prompt differ more; measured on the mini model only",
)
def test_seed_variety_changes_each_image_by_itself(probe):
    assert len(probe["variety"]) == 8
    for name, found in probe["variety"].items():
        assert min(found["effect"]) > 1e-3, name
        assert found["alone"] == 0.0, f"an image alone is the one in the batch: {name}"
        assert found["from core"] < 1e-6, f"the same behind core's sampler: {name}"
        assert found["off"], "strength 0 is the model itself"


def test_stronger_noise_leaves_image_to_image_alone(probe):
    for name, found in probe["variety"].items():
        assert (found["from a lower level"] == 0.0) == ("stronger" in name), name


def test_the_sizes_of_sdxl_are_not_noised(probe):
    assert probe["variety_of_sdxl"]["text"] > 1e-6 and probe["variety_of_sdxl"]["sizes"] == 0.0
