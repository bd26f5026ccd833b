"""The plan of a step's memory in the host's own Python (probe_plan.py)."""

from __future__ import annotations

import json

import pytest
from server import run_probe
from test_comfy_denoiser import FAMILIES


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    run_probe("probe_plan.py", folder)
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize(
    "case",
    [*(f"{family} ladd" for family in FAMILIES), "sd15 diffusion2gan", "flux diffusion2gan", "sd15 dmd2", "flux dmd2"],
)
def test_the_plan_is_what_a_real_step_takes(probe, case):
    planned, counted = probe["planned"][case]
    assert planned == pytest.approx(counted, rel=0.03)


def test_quantized_weights_count_as_they_are_stored(probe):
    found = probe["quantized"]
    assert found["planned"] == pytest.approx(found["stored"], rel=0.05)


def test_a_run_that_does_not_fit_is_told_what_to_change(probe):
    said = probe["said"]
    assert said["little"].startswith("this run needs about") and "batch_size 2 with accumulation 2" in said["little"]
    assert "about 1.2 GiB and 0 MiB are free" in said["refused"] and "preflight off" in said["refused"]
    assert said["unknown"] is None
