"""Models of the host that are told more of every picture than its latent: inpainting, editing (probe_items.py)."""

from __future__ import annotations

import json

import pytest
from server import run_probe

NETWORKS = {
    "sd15 inpainting": ["inpaint_mask", "masked_image"],
    "sd15 editing": ["source_image"],
    "flux fill": ["masked_image", "pixel_mask"],
    "flux control": ["source_image"],
}
every = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("items")
    run_probe("probe_items.py", folder)
    return json.loads((folder / "items.json").read_text())


def test_each_network_takes_its_own(probe):
    assert probe["names"] == NETWORKS | dict.fromkeys(("sd15", "flux", "flux2", "sd3", "wan"), [])


@every
def test_the_teacher_is_the_model_as_the_host_samples_it(probe, network):
    """With InpaintModelConditioning's or InstructPixToPixConditioning's values there, and a dataset's tensors here."""
    found = probe["same_as_sampling"][network]
    assert found["difference"] < 3e-6 and found["effect"] > 1e-3


@every
@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_the_students_gradient_is_right(probe, network, mode):
    """LADD's student loss, in float64, against five-point finite differences."""
    assert probe["gradients"][f"{network} {mode}"] < 1e-3


@every
def test_a_step_trains_the_student(probe, network):
    assert 0 < probe["steps"][network] < 1


@every
def test_core_loads_the_lora_without_a_warning_and_gives_the_students_output(probe, network):
    found = probe["exported_loras"][network]
    assert found["warnings"] == [] and found["difference"] < 1e-4 and found["effect"] > 5e-3


@pytest.mark.parametrize("network", ["sd15 inpainting", "flux fill"])
def test_a_report_fills_the_hole_and_leaves_the_rest(probe, network):
    found = probe["reports"][network]
    assert found["picture"] < 1e-6 and found["given"] == ["to fill"]
    assert found["outside"] and found["inside"] > 1e-2 and found["alone"] < 1e-5


def test_items_that_do_not_fit_the_model_are_refused(probe):
    found = probe["mistakes"]
    assert found["masked, filling"] == found["plain, ordinary"] == "accepted"
    for name in ("no input", "masked, ordinary"):
        assert "and this model has no input for it in the graph" in found[name]
    assert "the dataset plain has no inpaint_mask (a mask, 1 where" in found["plain, filling"]
    assert "make it with masks of Picture Folder" in found["plain, filling"]
