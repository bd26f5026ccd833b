import json
from pathlib import Path

import pytest
import torch

from distill_core.diffusion.process import DiscreteProcess, cumulative_alphas
from distill_core.diffusion.samplers import SAMPLERS
from distill_core.presets import levels as grids
from distill_core.presets import table as table
from distill_core.presets.explain import explain, table_page
from distill_core.presets.levels import flux2_mu, flux_mu, preset_sigmas, steady_flux2_mu
from distill_core.presets.table import auto_preset, find_preset, presets, presets_of

ROWS = list(presets().values())
KNOWN = [row for row in ROWS if row.grid["kind"] != "unlisted"]
LISTED = [(row, levels) for row in ROWS for levels in row.listed]


def name(value):
    return getattr(value, "key", None)


def test_the_table_is_complete():
    for row in ROWS:
        assert row.source and row.confidence in ("A", "B") and row.title and row.families
        assert row.grid["kind"] in grids.GRIDS and row.default_steps in row.steps
        assert row.sampler in (None, *SAMPLERS)
        assert set(row.auto) <= set(row.families)
    assert len({row.title for row in ROWS}) == len({row.key for row in ROWS}) == len(ROWS)


def test_every_row_quotes_what_its_source_states():
    for row in json.loads(table.TABLE.read_text(encoding="utf-8")):
        assert set(row["stated"]) == {"steps", "cfg", "sampler", "schedule", "space"}


@pytest.mark.parametrize("row, levels", LISTED, ids=name)
def test_computed_levels_are_the_listed_ones(row, levels):
    steps = len(levels) - (levels[-1] == 0)
    sigmas = preset_sigmas(row, steps)
    if row.grid["kind"] == "timesteps":
        process = DiscreteProcess(cumulative_alphas())
        assert process.timestep(sigmas[:-1]).tolist() == list(levels)
        return
    if row.grid["kind"] == "trigflow":  # listed as angles; 1.5708 is pi / 2 rounded up
        sigmas = torch.atan2(sigmas, 1 - sigmas)
    assert sigmas.tolist() == pytest.approx(levels, abs=1e-3)


@pytest.mark.parametrize("row", KNOWN, ids=name)
def test_every_allowed_step_count_gives_a_usable_list(row):
    for steps in row.steps:
        sigmas = preset_sigmas(row, steps)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        assert row.source in explain(row, steps, sigmas)


@pytest.mark.parametrize("row", [r for r in ROWS if r.grid["kind"] == "unlisted"], ids=name)
def test_unknown_levels_are_said_to_be_unknown(row):
    with pytest.raises(ValueError, match="(?s)use|script|needs"):
        preset_sigmas(row)


def test_steps_the_model_was_not_made_for():
    with pytest.raises(ValueError, match="made for 2 or 4 or 8 steps, not 5"):
        preset_sigmas(find_preset("sdxl-lightning"), 5)
    with pytest.raises(ValueError, match="made for 8 steps, not 9"):
        preset_sigmas(find_preset("z-image-turbo"), 9)


def test_unknown_key_lists_the_known():
    with pytest.raises(ValueError, match="flux-schnell"):
        find_preset("flux-snell")


@pytest.mark.parametrize(
    "family, steps, key",
    [
        ("flux-schnell", None, "flux-schnell"),
        ("qwen-image", 4, "qwen-image-lightning-4"),
        ("qwen-image", 8, "qwen-image-lightning-8"),
        ("sd3", None, "sd3.5-large-turbo"),
    ],
)
def test_auto(family, steps, key):
    assert auto_preset(family, steps).key == key


def test_auto_does_not_guess_between_distillations():
    with pytest.raises(ValueError, match="choose the one.*sdxl-lightning"):
        auto_preset("sdxl")
    with pytest.raises(ValueError, match="connect SIGMAS"):
        auto_preset("no such family")
    for family in {family for row in ROWS for family in row.families}:
        assert sum(family in row.auto for row in presets_of(family)) <= 1


def test_cfg_by_steps():
    assert [find_preset("hyper-sd3-lora").cfg_at(n) for n in (4, 8, 16)] == [3, 5, 7]


def test_the_two_turbo_grids_differ():
    sai, trailing = (preset_sigmas(find_preset(key), 4) for key in ("sdxl-turbo", "sdxl-turbo-trailing"))
    assert sai.tolist() == pytest.approx([14.61, 8.30, 5.09, 3.32, 0], abs=6e-3)
    assert trailing.tolist() == pytest.approx([14.61, 4.08, 1.61, 0.69, 0], abs=6e-3)


def test_flux2_mu_jumps_and_ours_does_not():
    tokens = lambda side: round(side * side / 256)  # noqa: E731
    assert flux2_mu(tokens(1040), 4) == pytest.approx(2.302, abs=1e-3)
    assert flux2_mu(tokens(1056), 4) == pytest.approx(1.194, abs=1e-3)
    assert flux2_mu(tokens(2048), 4) == pytest.approx(3.23, abs=1e-2)
    steady = [steady_flux2_mu(n, 4) for n in range(256, 20000, 16)]
    assert max(abs(a - b) for a, b in zip(steady, steady[1:], strict=False)) < 2e-3


def test_flux_mu_at_its_two_anchors():
    assert flux_mu(256) == pytest.approx(0.5) and flux_mu(4096) == pytest.approx(1.15)


def test_size_matters_where_the_grid_depends_on_it():
    klein, schnell = find_preset("flux2-klein"), find_preset("flux-schnell")
    assert not torch.equal(preset_sigmas(klein, 4), preset_sigmas(klein, 4, None, 512, 512))
    assert torch.equal(preset_sigmas(schnell, 4), preset_sigmas(schnell, 4, None, 512, 512))


def test_the_page_of_presets_is_the_tables():
    """docs/presets.md is written by ``python -m distill_core presets table``."""
    page = Path(__file__).parents[2] / "docs" / "presets.md"
    assert page.read_text(encoding="utf-8") == table_page()
    assert all(f"`{row.key}`" in table_page() for row in ROWS)
