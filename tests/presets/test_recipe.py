import json

import pytest
import torch

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import shifted_sigmas
from distill_core.presets.facts import ModelFacts
from distill_core.presets.levels import preset_sigmas
from distill_core.presets.recipe import make_recipe, student_levels
from distill_core.presets.table import find_preset

EPS = DiscreteProcess(cumulative_alphas())
SCHNELL = ModelFacts("flux-schnell", FlowProcess(1.0))
SD3 = ModelFacts("sd3", FlowProcess())
SDXL = ModelFacts("sdxl", EPS, EPS.sigmas)
STUDENT = {
    "turbo_distill.sigmas": "[1.0, 0.75, 0.5, 0.25]",
    "turbo_distill.sampler": "renoise",
    "turbo_distill.cfg": "1.0",
}


def test_auto_from_the_family():
    recipe = make_recipe(SCHNELL)
    assert recipe.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0] and recipe.sampler == "euler" and recipe.cfg == 1
    assert "black-forest-labs/flux" in recipe.explanation


@pytest.mark.parametrize("steps, levels", [(1, [1]), (2, [1, 0.5]), (3, [1, 0.75, 0.5]), (4, [1, 0.75, 0.5, 0.25])])
def test_auto_from_the_metadata_of_a_turbo_lora(steps, levels):
    recipe = make_recipe(ModelFacts("sd3", FlowProcess(), metadata=STUDENT), steps=steps)
    assert recipe.sigmas.tolist() == [*levels, 0] and recipe.sampler == "renoise"
    assert "own metadata" in recipe.explanation


def test_a_named_preset_wins_over_metadata():
    recipe = make_recipe(ModelFacts("sd3", FlowProcess(), metadata=STUDENT), "sd3.5-large-turbo")
    assert recipe.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_more_steps_than_the_student_has_levels():
    with pytest.raises(ValueError, match="steps must be 1-4"):
        student_levels(json.loads(STUDENT["turbo_distill.sigmas"]), 5)


def test_discrete_levels_come_from_the_models_own_table():
    other = DiscreteProcess(cumulative_alphas("linear", 1e-4, 0.02))
    recipe = make_recipe(ModelFacts("sdxl", other, other.sigmas), "dmd2-sdxl")
    assert other.timestep(recipe.sigmas[:-1]).tolist() == [999, 749, 499, 249]


def test_overrides():
    recipe = make_recipe(SDXL, "tcd-lora")
    assert recipe.sampler == "tcd" and recipe.sampler_options == {"eta": 0.3}
    recipe = make_recipe(SDXL, "tcd-lora", sampler="euler", cfg=1.5)
    assert recipe.sampler == "euler" and recipe.sampler_options == {} and recipe.cfg == 1.5


def test_connected_sigmas():
    sigmas = shifted_sigmas(3, shift_alpha=2.0)
    recipe = make_recipe(SCHNELL, sigmas=sigmas)
    assert torch.equal(recipe.sigmas, sigmas) and recipe.sampler == "euler"
    assert make_recipe(SDXL, sigmas=preset_sigmas(find_preset("dmd2-sdxl")), sampler="renoise").sampler == "renoise"


def test_denoise_is_said_in_the_explanation():
    recipe = make_recipe(SD3, denoise=0.5)
    assert (
        recipe.sigmas.tolist() == pytest.approx([0.75, 0.5, 0])
        and "Denoise 0.5 (snap): 0.75, 0.5, 0" in recipe.explanation
    )
    assert len(make_recipe(SD3, denoise=0.5, mode="respace").sigmas) == 5


@pytest.mark.parametrize(
    "model, choice, message",
    [
        (SCHNELL, dict(preset="dmd2-sdxl"), "for sdxl, but the model is flux-schnell"),
        (SCHNELL, dict(steps=9), "made for 1-4 steps, not 9"),
        (SCHNELL, dict(denoise=0.0), "denoise must be above 0"),
        (SCHNELL, dict(sigmas=torch.tensor([])), "at least one level"),
        (SCHNELL, dict(sigmas=torch.tensor([0.1, 0.9, 0.0])), "must fall"),
        (SCHNELL, dict(sigmas=torch.tensor([14.6, 1.0, 0.0])), "for another kind of model"),
        (SCHNELL, dict(sigmas=torch.tensor([1.0, 0.5, 0.0]), steps=4), "set steps to 0"),
        (SCHNELL, dict(video=True), "latents are a video"),
        (SCHNELL, dict(sampler="dpm"), "there is no sampler"),
        (SDXL, dict(), "choose the one your file"),
        (SDXL, dict(sigmas=torch.tensor([10.0, 0.0])), "choose one"),
        (SDXL, dict(preset="tdd-sdxl"), "use the authors' node"),
        (ModelFacts(None, FlowProcess()), dict(), "choose a preset or connect SIGMAS"),
        (ModelFacts("flux", FlowProcess()), dict(preset="pi-flow"), "needs a sampler of its own"),
    ],
)
def test_mistakes_are_explained(model, choice, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(model, **choice)


def test_a_video_preset_takes_videos():
    assert make_recipe(ModelFacts("wan", FlowProcess()), video=True).sigmas.tolist() == pytest.approx(
        [1, 0.9375, 0.8333, 0.625, 0], abs=1e-4
    )


def test_a_students_levels_are_trained_ones_only():
    trained = [1.0, 0.75, 0.5, 0.25]
    assert student_levels(trained).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert student_levels(trained, 2).tolist() == [1.0, 0.5, 0.0]
    assert student_levels(trained, 3).tolist() == [1.0, 0.75, 0.5, 0.0]  # 2/3 and 1/3 were not trained


def test_a_students_sampler_options_belong_to_its_own_sampler():
    said = {**STUDENT, "turbo_distill.sampler": "ancestral", "turbo_distill.sampler_options": '{"eta": 0.5}'}
    facts = ModelFacts("sd3", FlowProcess(), metadata=said)
    assert make_recipe(facts).sampler_options == {"eta": 0.5}
    assert make_recipe(facts, sampler="euler").sampler_options == {}


def test_a_student_that_says_its_size_has_levels_for_others():
    told = {**STUDENT, "turbo_distill.reference_pixels": str(512 * 512)}
    facts = ModelFacts("sd3", FlowProcess(), metadata=told)
    assert make_recipe(facts, width=512, height=512).sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert make_recipe(facts).sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]  # no size is said: the reference
    larger = make_recipe(facts, width=2048, height=512)  # four times the pixels: shifted by 2
    assert larger.sigmas.tolist() == pytest.approx([1, 6 / 7, 2 / 3, 0.4, 0])
    assert "shifted by 2 for 2048 x 512 pixels" in larger.explanation
    with pytest.raises(ValueError, match="reference_pixels are 0, not a size"):
        make_recipe(ModelFacts("sd3", FlowProcess(), metadata={**told, "turbo_distill.reference_pixels": "0"}))
