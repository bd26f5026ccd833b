import dataclasses
import math

import pytest
import torch

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import shifted_sigmas, sigmas_at_timesteps, turbo_timesteps
from distill_core.presets.checks import SamplingFacts, fitted_alpha
from distill_core.presets.doctor import diagnose
from distill_core.presets.table import find_preset, flux2_mu, preset_sigmas, twice_shifted_sigmas

EPS = DiscreteProcess(cumulative_alphas())


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
    assert faults(diagnosis) == {"scheduler": "error"} and "'normal'" in diagnosis.report
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
            assert faults(diagnosis) == {"flux2_jump": "warning"}
            assert math.log(fitted_alpha(diagnosis.sigmas)) == pytest.approx(flux2_mu(4300, 4), abs=0.01)
    sigmas = shifted_sigmas(4, shift_mu=flux2_mu(4225, 4))
    assert diagnose(flow("flux2", math.exp(2.02)), sigmas, 1.0, "auto", 1040, 1040).findings == []


def test_cfg_on_a_distilled_model():
    facts, sigmas = flow("flux-schnell", 1.0), shifted_sigmas(4, shift_alpha=1.0)
    assert faults(diagnose(facts, sigmas, 3.5)) == {"cfg": "error"}
    assert faults(diagnose(flow("sd3", 3.0, 1000.0), shifted_sigmas(4, shift_alpha=3.0), 1.2)) == {}
    hyper = diagnose(flow("sd3", 3.0, 1000.0), shifted_sigmas(4, shift_alpha=3.0), 1.0, "hyper-sd3-lora")
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
    for sigmas in (torch.tensor([]), torch.tensor([0.2, 0.9, 0.0]), torch.tensor([1.0, 0.5])):
        assert faults(diagnose(flow("sd3", 3.0, 1000.0), sigmas, 1.0)) == {"unusable": "error"}


def test_a_student_is_compared_with_its_own_metadata():
    facts = dataclasses.replace(flow("sd3", 3.0, 1000.0), metadata={"turbo_distill.sigmas": "[1.0, 0.75, 0.5, 0.25]"})
    assert diagnose(facts, shifted_sigmas(4, shift_alpha=1.0), 1.0).findings == []
    assert faults(diagnose(facts, shifted_sigmas(4, shift_alpha=3.0), 1.0)) == {"other_shift": "error"}


def test_wrong_preset_is_refused():
    with pytest.raises(ValueError, match="but the model is sd3"):
        diagnose(flow("sd3", 3.0, 1000.0), shifted_sigmas(4, shift_alpha=3.0), 1.0, "flux-schnell")
