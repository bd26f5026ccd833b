"""Every list that Turbo Preset can give passes the Doctor, and so does every list that the Doctor gives."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import DENOISE_MODES
from distill_core.presets.doctor import diagnose
from distill_core.presets.facts import SamplingFacts
from distill_core.presets.levels import preset_sigmas
from distill_core.presets.parts import lies_above
from distill_core.presets.recipe import make_recipe
from distill_core.presets.table import presets

EPS = DiscreteProcess(cumulative_alphas())
KNOWN = [row for row in presets().values() if row.known]


def facts_for(row, family):
    """A model as its preset asks for it, with nothing wrong with it."""
    discrete = row.grid["kind"] == "timesteps"
    kind = row.prediction or ("eps" if discrete else "flow")
    timestep_of = (lambda sigma: EPS.timestep(sigma).float()) if discrete else (lambda sigma: sigma)
    scale = row.noise_scale or 1.0
    return SamplingFacts(
        family,
        EPS if discrete else FlowProcess(),
        EPS.sigmas if discrete else None,
        guidance_embedded=row.guidance_input,
        strengths=(row.lora_strength or 1.0,) if row.lora else (),
        timestep_of=timestep_of,
        native_timestep_of=timestep_of,
        audio_shift=row.audio_shift,
        noise_scale=scale,
        native_noise_scale=scale,
        prediction=kind,
        native_prediction="eps" if discrete else "flow",
    )


def faults(diagnosis):
    return [f"{f.fault}: {f.what}" for f in diagnosis.findings if f.severity != "note"]


@st.composite
def recipes(draw):
    """A preset, what Turbo Preset makes of it, and the model."""
    row = draw(st.sampled_from(KNOWN))
    facts = facts_for(row, draw(st.sampled_from(row.families)))
    side = st.integers(1, 160).map(lambda n: 16 * n)
    size = dict(width=draw(side), height=draw(side))
    choice = dict(
        preset=row.key,
        steps=draw(st.sampled_from(row.all_steps)),
        denoise=draw(st.integers(1, 100)) / 100,
        mode=draw(st.sampled_from(sorted(DENOISE_MODES))),
        sampler=row.sampler or "euler",
        video=row.video,
    )
    return row, facts, make_recipe(facts, **choice, **size), size


@settings(max_examples=100, deadline=None)
@given(recipes())
@pytest.mark.case("sampling D2", "a list of Turbo Preset passes the Doctor at any denoise, mode, size and family")
@pytest.mark.case("sampling 7", "the Doctor accepts what an inpainting at any denoise runs on")
def test_what_turbo_preset_gives_passes(case):
    row, facts, recipe, size = case
    found = diagnose(facts, recipe.sigmas, recipe.cfg, row.key, **size, guidance=row.guidance)
    assert faults(found) == [] and found.part is not None
    given_, mended = recipe.sigmas, found.sigmas
    assert mended[0] <= given_[0] * 1.001 and len(mended) >= 2 or found.part.whole
    again = diagnose(facts, mended, recipe.cfg, row.key, **size, guidance=row.guidance)
    assert faults(again) == []


@settings(max_examples=40, deadline=None)
@given(recipes())
def test_it_passes_without_the_preset_being_named(case):
    """By the family alone: what the Doctor cannot know is a note. The size is known, as Turbo Sampler knows it."""
    row, facts, recipe, size = case
    assert faults(diagnose(facts, recipe.sigmas, recipe.cfg, **size)) in ([], _named(row, facts, recipe, size))


def _named(row, facts, recipe, size):
    """What a preset that the family usually means asks of the model beside levels, and this file does not have."""
    found = diagnose(facts, recipe.sigmas, recipe.cfg, **size)
    about_levels = {"other_list", "other_shift", "unshifted", "shift_unit", "shift_twice", "scheduler", "steps", "cfg"}
    assert not {f.fault for f in found.findings if f.severity != "note"} & about_levels
    return faults(found)


@st.composite
def any_list(draw):
    """A list of any levels, whole, begun late or ended early."""
    row = draw(st.sampled_from(KNOWN))
    highest = 0.9999 if row.grid["kind"] != "timesteps" else 14.6
    levels = draw(st.lists(st.integers(1, 9999), min_size=1, max_size=12, unique=True))
    sigmas = sorted((highest * level / 9999 for level in levels), reverse=True)
    if draw(st.booleans()):
        sigmas[0] = 1.0 if highest < 1 else 14.6146
    if draw(st.booleans()) or len(sigmas) < 2:
        sigmas.append(0.0)
    return row, torch.tensor(sigmas)


@settings(max_examples=100, deadline=None)
@given(any_list())
def test_what_the_doctor_gives_passes_and_stays_within_the_ends(case):
    row, sigmas = case
    facts = facts_for(row, row.families[0])
    mended = diagnose(facts, sigmas, row.cfg, row.key, guidance=row.guidance).sigmas
    assert mended[0] <= sigmas[0] * 1.001 and mended[-1] >= sigmas[-1] * 0.999
    assert (mended.diff() < 0).all()
    again = diagnose(facts, mended, row.cfg, row.key, guidance=row.guidance)
    levels = [f.fault for f in again.findings if f.severity != "note" and not f.fault.startswith("cfg")]
    if again.part is None and lies_above(sigmas, preset_sigmas(row, process=facts.process)):
        assert mended.tolist() == sigmas.tolist() and levels  # no trained level lies between its ends
        return
    assert levels == [] and (again.sigmas.diff() < 0).all()


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.key)
def test_denoise_just_below_1_passes(row):
    """Where a list starts so near the full noise that it could be taken for a whole one."""
    facts = facts_for(row, row.families[0])
    for mode, percent in itertools.product(DENOISE_MODES, range(90, 100)):
        choice = dict(denoise=percent / 100, mode=mode, sampler=row.sampler or "euler", video=row.video)
        recipe = make_recipe(facts, row.key, **choice)
        found = diagnose(facts, recipe.sigmas, recipe.cfg, row.key, 1024, 1024, guidance=row.guidance)
        assert faults(found) == [] and found.part is not None, (mode, percent)


def test_the_property_can_fail():
    row = presets()["sd3.5-large-turbo"]
    facts = dataclasses.replace(facts_for(row, "sd3"), native_shift_alpha=3.0, shift_alpha=3.0)
    assert faults(diagnose(facts, torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0]), 1.0, row.key))
    assert math.isfinite(diagnose(facts, torch.tensor([0.75, 0.5, 0.0]), 1.0, row.key).sigmas.sum())
