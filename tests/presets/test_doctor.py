import dataclasses
import math

import pytest
import torch

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import shifted_sigmas, sigmas_at_timesteps, turbo_timesteps
from distill_core.presets.checks import fitted_alpha
from distill_core.presets.doctor import diagnose
from distill_core.presets.facts import SamplingFacts, TurboLora
from distill_core.presets.levels import flux2_mu, preset_sigmas, twice_shifted_sigmas
from distill_core.presets.parts import SAME, distance
from distill_core.presets.recipe import make_recipe
from distill_core.presets.table import find_preset, presets

EPS = DiscreteProcess(cumulative_alphas())
KNOWN = [row for row in presets().values() if row.known]


def flow(family, alpha, multiplier=1.0, **changes):
    """A flow model as the host loads it; changes are what nodes did to it."""
    timestep_of = lambda sigma: sigma * multiplier  # noqa: E731
    facts = SamplingFacts(
        family,
        FlowProcess(multiplier, alpha),
        timestep_of=timestep_of,
        native_timestep_of=timestep_of,
        shift_alpha=alpha,
        native_shift_alpha=alpha,
        prediction="flow",
        native_prediction="flow",
    )
    return dataclasses.replace(facts, **changes)


def eps(family, **changes):
    timestep_of = lambda sigma: EPS.timestep(sigma).float()  # noqa: E731
    facts = SamplingFacts(
        family,
        EPS,
        EPS.sigmas,
        timestep_of=timestep_of,
        native_timestep_of=timestep_of,
        prediction="eps",
        native_prediction="eps",
    )
    return dataclasses.replace(facts, **changes)


def faults(diagnosis):
    return {finding.fault: finding.severity for finding in diagnosis.findings}


HEALTHY = [
    (flow("sd3", 3.0, 1000.0), "auto", shifted_sigmas(4, shift_alpha=3.0)),
    (flow("flux-schnell", 1.0), "auto", shifted_sigmas(2, shift_alpha=1.0)),
    (flow("z-image", 3.0), "auto", shifted_sigmas(8, shift_alpha=3.0)),
    (flow("qwen-image", math.exp(1.15)), "auto", shifted_sigmas(4, shift_mu=1.15)),
    (flow("krea2", math.exp(1.15)), "auto", shifted_sigmas(8, shift_mu=1.15)),
    (flow("flux2", math.exp(2.02)), "auto", shifted_sigmas(4, shift_mu=flux2_mu(4096, 4))),
    (eps("sdxl"), "auto", sigmas_at_timesteps(EPS, [999, 749, 499, 249])),
    (eps("sdxl"), "sdxl-turbo", sigmas_at_timesteps(EPS, turbo_timesteps(4))),
]


@pytest.mark.parametrize("facts, preset, sigmas", HEALTHY)
def test_nothing_is_found_where_nothing_is_wrong(facts, preset, sigmas):
    diagnosis = diagnose(facts, sigmas, 1.0, preset)
    assert diagnosis.findings == [] and "No fault found" in diagnosis.report
    assert not diagnosis.restore_model


def test_mu_typed_as_factor():
    """Qwen's 1.15 typed in ModelSamplingAuraFlow: [1, .775, .535, .277, 0]."""
    sigmas = shifted_sigmas(4, shift_alpha=1.15)
    assert sigmas.tolist() == pytest.approx([1, 0.775, 0.535, 0.277, 0], abs=1e-3)
    diagnosis = diagnose(flow("krea2", 1.15, patched=True), shifted_sigmas(8, shift_alpha=1.15), 1.0)
    assert faults(diagnosis)["shift_unit"] == "error" and "typed where a factor is expected" in diagnosis.report
    assert diagnosis.sigmas.tolist() == pytest.approx(shifted_sigmas(8, shift_mu=1.15).tolist())
    assert diagnosis.restore_model and diagnosis.shift_alpha == pytest.approx(math.exp(1.15), rel=1e-3)


def test_factor_typed_as_mu():
    """3 typed as max_shift of ModelSamplingFlux: alpha 20, [1, .984, .953, .870, 0]."""
    sigmas = shifted_sigmas(4, shift_mu=3.0)
    assert sigmas.tolist() == pytest.approx([1, 0.984, 0.953, 0.870, 0], abs=1e-3)
    diagnosis = diagnose(flow("qwen-image", math.exp(3), patched=True), sigmas, 1.0)
    assert faults(diagnosis)["shift_unit"] == "error" and "ModelSamplingFlux takes mu" in diagnosis.report


@pytest.mark.parametrize("native, given, node", [(1000.0, 1.0, "SD3"), (1.0, 1000.0, "AuraFlow")])
def test_wrong_timestep_multiplier(native, given, node):
    facts = dataclasses.replace(flow("sd3", 3.0, native), timestep_of=lambda sigma: sigma * given, patched=True)
    diagnosis = diagnose(facts, shifted_sigmas(4, shift_alpha=3.0), 1.0)
    assert faults(diagnosis) == {"time_scale": "error"}
    assert "1000 times" in diagnosis.report and f"ModelSampling{node}" in diagnosis.report and diagnosis.restore_model


def test_a_shift_node_too_many():
    """Krea 2 has its shift; a node that sets 3.85 after it is one too many, the equivalent 3.158 is not refused."""
    wrong = dataclasses.replace(flow("krea2", math.exp(1.15)), patched=True, shift_alpha=20.0)
    diagnosis = diagnose(wrong, shifted_sigmas(8, shift_alpha=20.0), 1.0)
    assert faults(diagnosis)["extra_shift_node"] == "error" and diagnosis.restore_model
    same = dataclasses.replace(flow("krea2", math.exp(1.15)), patched=True, shift_alpha=3.158)
    assert faults(diagnose(same, shifted_sigmas(8, shift_alpha=3.158), 1.0)) == {"idle_shift_node": "note"}


def test_shift_applied_twice():
    diagnosis = diagnose(flow("sd3", 9.0, 1000.0, patched=True), shifted_sigmas(4, shift_alpha=9.0), 1.0)
    assert faults(diagnosis)["shift_twice"] == "error"


def test_scheduler_normal_is_not_simple():
    diagnosis = diagnose(flow("sd3", 3.0, 1000.0), twice_shifted_sigmas(4, 3.0), 1.0)
    assert faults(diagnosis) == {"scheduler": "note"} and "'normal'" in diagnosis.report
    official = diagnose(flow("sd3", 3.0, 1000.0), twice_shifted_sigmas(4, 3.0), 1.0, "sd3.5-large-turbo-official")
    assert official.findings == []


def test_another_list():
    karras = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0])
    assert faults(diagnose(flow("sd3", 3.0, 1000.0), karras, 1.0)) == {"other_list": "error"}
    assert faults(diagnose(flow("sd3", 3.0, 1000.0), shifted_sigmas(4, shift_alpha=1.0), 1.0)) == {"unshifted": "error"}
    assert faults(diagnose(flow("wan", 8.0, 1000.0), shifted_sigmas(4, shift_alpha=8.0), 1.0)) == {
        "other_shift": "error"
    }


def test_nine_steps_of_z_image():
    diagnosis = diagnose(flow("z-image", 3.0), shifted_sigmas(9, shift_alpha=3.0), 1.0)
    assert faults(diagnosis) == {"one_step_more": "error"} and "set steps to 8" in diagnosis.report
    assert torch.equal(diagnosis.sigmas, preset_sigmas(find_preset("z-image-turbo")))


def test_the_jump_of_flux2():
    for side in (1056, 2048):
        tokens = side * side // 256
        sigmas = shifted_sigmas(4, shift_mu=flux2_mu(tokens, 4))
        for size in ((None, None), (side, side)):
            diagnosis = diagnose(flow("flux2", math.exp(2.02)), sigmas, 1.0, "auto", *size)
            assert faults(diagnosis) == {"flux2_jump": "note"}
            assert math.log(fitted_alpha(diagnosis.sigmas)) == pytest.approx(flux2_mu(4300, 4), abs=0.01)
    sigmas = shifted_sigmas(4, shift_mu=flux2_mu(4225, 4))
    assert diagnose(flow("flux2", math.exp(2.02)), sigmas, 1.0, "auto", 1040, 1040).findings == []


def test_cfg_on_a_distilled_model():
    facts, sigmas = flow("flux-schnell", 1.0), shifted_sigmas(4, shift_alpha=1.0)
    assert faults(diagnose(facts, sigmas, 3.5)) == {"cfg": "error"}
    assert faults(diagnose(flow("sd3", 3.0, 1000.0), shifted_sigmas(4, shift_alpha=3.0), 1.2)) == {}
    hyper = diagnose(flow("sd3", 3.0, 1000.0), twice_shifted_sigmas(4, 3.0), 1.0, "hyper-sd3-lora")
    assert faults(hyper) == {"cfg_low": "warning"}
    dev = dataclasses.replace(flow("flux", math.exp(1.15)), guidance_embedded=True)
    assert faults(diagnose(dev, shifted_sigmas(20, shift_mu=1.15), 3.5)) == {"cfg": "error"}


def test_levels_of_another_kind_of_model():
    turbo = sigmas_at_timesteps(EPS, turbo_timesteps(4))
    assert faults(diagnose(flow("flux-schnell", 1.0), turbo, 1.0)) == {"other_kind": "error"}
    assert "other_kind" in faults(diagnose(eps("sdxl"), shifted_sigmas(4, shift_alpha=3.0), 1.0, "dmd2-sdxl"))


def test_one_step_model_that_predicts_x0():
    sigmas = sigmas_at_timesteps(EPS, [999])
    assert faults(diagnose(eps("sdxl"), sigmas, 1.0, "sdxl-lightning-1step")) == {"prediction": "error"}
    assert diagnose(eps("sdxl", prediction="x0"), sigmas, 1.0, "sdxl-lightning-1step").findings == []


def test_unusable_lists_are_reported_not_raised():
    for sigmas in (torch.tensor([]), torch.tensor([0.2, 0.9, 0.0]), torch.tensor([1.0, -0.5])):
        assert faults(diagnose(flow("sd3", 3.0, 1000.0), sigmas, 1.0)) == {"unusable": "error"}


def test_a_student_is_compared_with_its_own_metadata():
    facts = dataclasses.replace(flow("sd3", 3.0, 1000.0), metadata={"turbo_distill.sigmas": "[1.0, 0.75, 0.5, 0.25]"})
    assert diagnose(facts, shifted_sigmas(4, shift_alpha=1.0), 1.0).findings == []
    assert faults(diagnose(facts, shifted_sigmas(4, shift_alpha=3.0), 1.0)) == {"other_shift": "error"}


def test_wrong_preset_is_refused():
    with pytest.raises(ValueError, match="but the model is sd3"):
        diagnose(flow("sd3", 3.0, 1000.0), shifted_sigmas(4, shift_alpha=3.0), 1.0, "flux-schnell")


@pytest.mark.parametrize(
    "key, levels, first",
    [
        ("hyper-sdxl-1step-unet", [14.61, 0.0], 5.111),
        ("dmd2-sdxl-1step", [14.61, 0.5], 1.161),
        ("ltx2-stage-2", [1.0, 0.725, 0.421875, 0.0], 0.9094),
    ],
)
def test_a_list_that_starts_above_the_trained_one_is_no_part_of_it(key, levels, first):
    row = find_preset(key)
    facts = eps(row.families[0]) if row.grid["kind"] == "timesteps" else flow(row.families[0], 1.0)
    found = diagnose(facts, torch.tensor(levels), row.cfg, key)
    assert "other_list" in faults(found) and f"where {first} was the first level" in found.report
    assert found.part is None and found.sigmas[0].item() == pytest.approx(first, rel=1e-3)
    assert found.sigmas[-1].item() == levels[-1]
    assert not {"other_list", "steps"} & faults(diagnose(facts, found.sigmas, row.cfg, key)).keys()


def test_a_list_above_the_trained_one_is_told_so_and_left_alone():
    found = diagnose(eps("sdxl"), torch.tensor([14.61, 5.0, 2.0]), 1.0, "dmd2-sdxl-1step")
    assert "nothing of the trained list lies between these ends" in found.report
    assert found.sigmas.tolist() == pytest.approx([14.61, 5.0, 2.0])


def test_what_is_known_of_a_family_is_not_denied():
    karras = torch.tensor([14.61, 8.0, 5.0, 0.9, 0.0])
    report = diagnose(eps("sdxl"), karras, 1.0).report
    assert "not examined: the noise levels: nothing says which of its family's lists" in report
    assert "no trained list is known for this model" in diagnose(eps("cascade"), karras, 1.0).report


def test_a_size_that_leaves_no_levels_is_named():
    facts = flow("flux2", math.exp(2.02), guidance_embedded=False)
    with pytest.raises(ValueError, match="1048576 tokens .* makes all of them 1; make the picture smaller"):
        preset_sigmas(find_preset("flux2-klein"), None, None, 16384, 16384)
    assert diagnose(facts, torch.tensor([1.0, 0.9, 0.5, 0.2, 0.0]), 1.0, "flux2-klein", 16384, 16384).findings


@pytest.mark.parametrize(
    "levels, words",
    [
        ([1.0, 0.5, -0.1], "cannot be below 0; level 3 of 3 is -0.1"),
        ([1.0, 0.9, float("nan"), 0.0], "must be finite; level 3 of 4 is nan"),
        ([0.5, 0.9, 0.0], "level 2 of 3 is 0.9, after 0.5"),
        ([[1.0, 0.0], [1.0, 0.0]], "must be one list of levels, not of shape"),
        ([1.0], "holds 1 level;"),
    ],
)
def test_unusable_lists_are_named_by_what_is_wrong(levels, words):
    found = diagnose(flow("sd3", 3.0), torch.tensor(levels), 1.0)
    assert faults(found) == {"unusable": "error"} and words in found.report
    assert torch.equal(found.sigmas, torch.tensor(levels)) or "nan" in words


def test_whole_numbers_are_levels_too():
    found = diagnose(flow("sd3", 3.0), torch.tensor([1, 0]), 1.0)
    assert found.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_cfg_in_words_that_are_true_of_the_preset():
    row = find_preset("hyper-sd-cfg-lora")
    levels = preset_sigmas(row, 8)
    facts = eps("sdxl", strengths=(1.0,))
    assert "used with 8 at most" in diagnose(facts, levels, 12.0, row.key).report
    assert "distilled in" not in diagnose(facts, levels, 12.0, row.key).report
    assert "cfg is nan" in diagnose(facts, levels, math.nan, row.key).report
    assert "made for cfg 5 at 8 steps" in diagnose(facts, levels[4:], 1.0, row.key).report


def test_a_students_own_list_is_named_before_shorter_ones():
    facts = flow("sd3", 3.0, loras=(TurboLora("own", {"turbo_distill.sigmas": "[1.0, 0.6, 0.3]"}),))
    for levels in ([0.6, 0.3, 0.0], [1.0, 0.6], [0.6, 0.3]):
        assert "trained: 1, 0.6, 0.3, 0\n" in diagnose(facts, torch.tensor(levels), 1.0).report
    assert "trained: 1, 0\n" in diagnose(facts, torch.tensor([1.0, 0.0]), 1.0).report + "\n"


def test_a_preset_of_another_kind_of_model_is_refused_where_no_family_tells():
    for facts, key, words in [(flow(None, 3.0), "sdxl-turbo", "discrete"), (eps(None), "flux-schnell", "flow")]:
        with pytest.raises(ValueError, match=f"is for {words} models, but this is a"):
            make_recipe(facts, key)
        with pytest.raises(ValueError, match=f"is for {words} models, but this is a"):
            diagnose(facts, torch.tensor([1.0, 0.5, 0.0]), 1.0, key)


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.key)
def test_both_halves_of_a_list_split_anywhere_are_parts(row):
    """Two experts: the first ends where the second begins."""
    facts = eps(row.families[0]) if row.grid["kind"] == "timesteps" else flow(row.families[0], 1.0)
    levels = preset_sigmas(row, process=facts.process)
    for i in range(1, len(levels) - 1):
        for half in (levels[: i + 1], levels[i:]):
            found = diagnose(facts, half, row.cfg, row.key)
            assert found.part is not None and distance(found.sigmas, half, facts.table) <= SAME, i
