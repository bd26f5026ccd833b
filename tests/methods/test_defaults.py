import pytest
import torch

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.methods.defaults import (
    MOST_STEPS,
    auto_levels,
    levels_for,
    preset_levels,
    probabilities_for,
    starting_values,
)
from distill_core.presets.facts import ModelFacts


def test_levels_are_the_process_own_grid():
    assert levels_for(FlowProcess(), 4) == (1.0, 0.75, 0.5, 0.25)
    assert levels_for(FlowProcess(shift_alpha=3.0), 4) == pytest.approx((1.0, 0.9, 0.75, 0.5))
    process = DiscreteProcess(cumulative_alphas())
    trailing = process.sigma(torch.tensor([999, 749, 499, 249])).tolist()
    assert levels_for(process, 4) == pytest.approx(trailing) and levels_for(process, 1) == pytest.approx(trailing[:1])


@pytest.mark.parametrize("steps", [0, MOST_STEPS + 1])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="a student is trained for 1-8 steps"):
        levels_for(FlowProcess(), steps)


def test_levels_of_a_preset_come_with_its_sampler():
    levels, sampler, _ = preset_levels(ModelFacts("flux-schnell", FlowProcess(1.0)), "flux-schnell", 4)
    assert levels == (1.0, 0.75, 0.5, 0.25) and sampler == "euler"
    with pytest.raises(ValueError, match="is for flux-schnell, but the model is sd3|is for .* but the model is sd3"):
        preset_levels(ModelFacts("sd3", FlowProcess()), "flux-schnell", 4)


@pytest.mark.parametrize("count", range(1, MOST_STEPS + 1))
def test_probabilities_sum_to_one_and_favour_the_first_level(count):
    values = probabilities_for(count)
    assert len(values) == count and sum(values) == pytest.approx(1) and values[0] == max(values)
    assert min(values) > 0


def test_every_family_has_starting_values():
    assert (
        starting_values(None) == starting_values("sd3")
        and starting_values("sd15").renoise_mean < starting_values("sdxl").renoise_mean
    )


TURBO = {
    "turbo_distill.family": "sd3",
    "turbo_distill.sigmas": "[1.0, 0.75, 0.5, 0.25]",
    "turbo_distill.sampler": "ancestral",
    "turbo_distill.sampler_options": '{"eta": 1.0}',
}


@pytest.mark.case("training D5", "auto: the file's levels, else those of a family of turbos, else evenly spaced ones")
@pytest.mark.case("training 5", "a tuned turbo is trained at its own levels, with its own sampler")
@pytest.mark.parametrize(
    ("family", "metadata", "steps", "levels", "sampler", "said"),
    [
        ("sd3", TURBO, 4, (1.0, 0.75, 0.5, 0.25), "ancestral", "is a turbo: the levels of the file's own metadata"),
        ("sd3", TURBO, 2, (1.0, 0.5), "ancestral", "is a turbo"),
        ("sd3", TURBO, 8, None, "renoise", "but not for this: this file was trained at 4 noise levels"),
        ("sd3", {}, 4, None, "renoise", "evenly spaced levels"),
        ("flux-schnell", {}, 4, (1.0, 0.75, 0.5, 0.25), "euler", "is a turbo: the levels of FLUX.1 schnell"),
        ("flux-schnell", {}, 8, None, "renoise", "but not for this"),
        (None, {}, 4, None, "renoise", "evenly spaced levels"),
    ],
)
def test_auto_levels(family, metadata, steps, levels, sampler, said):
    process = FlowProcess(1000.0, 1.0 if family == "flux-schnell" else 3.0)
    found, chosen, _, why = auto_levels(ModelFacts(family, process, metadata=metadata), process, steps)
    assert found == (levels_for(process, steps) if levels is None else levels)
    assert chosen == sampler and said in why
