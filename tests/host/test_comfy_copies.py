"""Networks of the host copied to train all their weights, in the host's own Python (probe_copies.py)."""

from __future__ import annotations

import json

import pytest
from server import run_probe
from test_comfy_denoiser import FAMILIES

FEW_BLOCKS = ("wan", "sd15")  # the tiny ones have a single scale


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("copies")
    run_probe("probe_copies.py", folder)
    return json.loads((folder / "copies.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_teacher_with_weights_of_its_own(probe, family):
    """MODEL has a LoRA, which the copy has in its weights; a path that was hooked onto the teacher stays there."""
    found = probe["same_network"][family]
    assert found["difference"] < 1e-6, "rounding at most: a product depends on where its matrices lie in memory"
    assert found["hooked"] == 0 and found["moved"] > 1e-2 and found["teacher as before"]
    loose = {"wan": 2, "lumina": 2}  # modulations, padding tokens: the host cannot load them
    assert (
        len(found["frozen"]) == loose.get(family, 0)
        and found["float32"]
        and not found["shared"]
        and found["trained"] == [True, False]
    )
    assert found["gone"], "it is not kept once training is over"


@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_all_weights_is_right(probe, family, mode):
    """In float64 against five-point finite differences, through the student and then the teacher's features."""
    assert probe["gradients"][f"{family} {mode}"] < 1e-3


@pytest.mark.parametrize("precision", ["torch.bfloat16", "torch.float8_e4m3fn"])
@pytest.mark.parametrize("family", ["sd3", "flux", "sd15", "wan"])
def test_a_file_in_low_precision_is_trained_in_float32(probe, family, precision):
    found = probe["precisions"][f"{family} {precision}"]
    assert precision in found["teacher"] and found["difference"] < 1e-5 and found["gradients"]


@pytest.mark.parametrize("family", FAMILIES)
def test_core_loads_all_weights_as_differences(probe, family):
    """On a MODEL with a LoRA, through LoraLoaderModelOnly's way and LoraModelLoader's, without a warning."""
    found = probe["exported_differences"][family]
    assert found["warnings"] == [] and found["difference"] < 1e-5 and found["same"] and found["effect"] > 1e-2


@pytest.mark.parametrize("family", ["sd3", "flux", "sd15", "lumina"])
def test_a_step_on_all_weights_moves_the_copy_alone(probe, family):
    found = probe["full_step"][family]
    assert found["moved"] > 0.9 and found["others as before"] and found["their gradients"] == []


@pytest.mark.parametrize("critic", ["copy", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_network_judges_on_every_family(probe, family, critic):
    """A step of Diffusion2GAN with its R1, with and without checkpointing."""
    found = probe["critics"][f"{family} {critic}"]
    reads, entries = found["scales"]
    assert found["own network"] == (critic == "copy") and found["r1"] > 0
    assert found["checkpointing"] < 1e-5, "the same gradients, those of the double backward, too"
    assert found["input convs"] == len(entries) == len(reads) - 1 and (len(reads) > 1 or family in FEW_BLOCKS)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FEW_BLOCKS])
def test_smaller_latents_enter_the_image_alone(probe, family):
    """Not the text's tokens nor the fill; each row takes its own latents, also among texts of different lengths."""
    found = probe["fed_blocks"][family]
    moved = [count for count in found["positions"] if count]
    image = found["image"] // (4 if family == "sdxl" else 1)  # a UNet takes it at half the sides
    assert moved and set(moved) == {image} and found["effect"] > 1e-2 and found["rows alone"] < 1e-5
