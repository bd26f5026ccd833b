"""What the presets say of core's own schedulers and models, run in the host (probe_presets.py)."""

from __future__ import annotations

import json

import pytest
from server import run_probe

from distill_core.presets.reference import HOST
from distill_core.presets.table import presets

KNOWN = [row for row in presets().values() if row.known]
AGREES = 2.5e-3  # flow time; core's tables have 1000 levels, and its schedulers take one of them


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("presets")
    run_probe("probe_presets.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.key)
def test_the_ksampler_settings_give_the_levels_or_none_does(probe, row):
    found, said = probe["rows"][row.key], row.ksampler or {}
    assert found["distance"] <= AGREES
    if "scheduler" not in said:
        assert found["nearest"]["distance"] > AGREES or "node" in said
    if said.get("own") and row.key != "wan-causal-forcing":  # its class of Wan has a shift of its own
        assert said["alpha"] == pytest.approx(found["own"], rel=2e-3)


def test_rows_whose_reference_is_core_are_what_core_gives(probe):
    """Within 1e-3, but where the steps do not divide core's table and its scheduler takes the level before."""
    rows = [row for row in KNOWN if row.reference["scheduler"] == HOST]
    assert len(rows) >= 15 and all(row.ksampler for row in rows)
    apart = {row.key: found for row in rows if (found := probe["rows"][row.key]["distance"]) > 1e-3}
    assert apart.keys() <= {"qwen-image-distill-full"} and all(found <= AGREES for found in apart.values())


def test_scheduler_nodes_give_the_levels_of_their_presets(probe):
    nodes = {row.ksampler["node"] for row in KNOWN if row.ksampler and "node" in row.ksampler}
    assert nodes == probe["nodes"].keys()
    assert max(probe["nodes"].values()) < 1e-6


@pytest.mark.case("sampling D7", "a repaired MiniMax-H3 keeps the shift of its sound, in core's own class")
def test_a_repaired_model_keeps_its_shift_of_the_sound(probe):
    found = probe["minimax"]
    assert found["native"] == [12.0, 3.0] and found["repaired"] == [6.0, 3.0, 2.0] and found["kept"] == [6.0, 3.0]


@pytest.mark.case("sampling D6", "the host tells which strengths of LoRAs are on a model's weights")
def test_the_host_tells_of_loras_and_guidance(probe):
    assert probe["facts"]["strengths"] == [[], [0.7]]
    assert probe["facts"]["guidance"] == [2.5, None]


@pytest.mark.case("sampling D16", "the official LCM workflow gets no warning")
def test_the_official_lcm_workflow(probe):
    assert probe["facts"]["lcm"] == {"no_lora": "warning"}, "none was loaded here; the model and list are right"
