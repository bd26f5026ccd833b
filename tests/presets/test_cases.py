"""Cases that users reported in public, as what the presets and the Doctor make of them now."""

import dataclasses
import math

import pytest
import torch
from test_properties import facts_for

from distill_core.diffusion.process import FlowProcess
from distill_core.diffusion.schedules import shifted_sigmas
from distill_core.presets.doctor import diagnose
from distill_core.presets.explain import in_ksampler
from distill_core.presets.facts import ModelFacts, TurboLora
from distill_core.presets.levels import preset_sigmas
from distill_core.presets.recipe import make_recipe
from distill_core.presets.table import find_preset

LTX = find_preset("ltx2-distilled")
MINIMAX = find_preset("minimax-h3-turbo-768p")


def model(key, **changes):
    row = find_preset(key)
    return dataclasses.replace(facts_for(row, row.families[0]), **changes)


def severities(diagnosis):
    return {finding.fault: finding.severity for finding in diagnosis.findings}


def sigmas(*levels):
    return torch.tensor(levels)


@pytest.mark.case("sampling 1", "an embedded guidance other than the trained one is found, and an unknown one is said")
def test_embedded_guidance_is_examined():
    facts, row = model("flux2-dev-turbo-lora"), find_preset("flux2-dev-turbo-lora")
    levels = preset_sigmas(row)
    assert severities(diagnose(facts, levels, 1.0, row.key, guidance=3.5)) == {"guidance": "warning"}
    assert severities(diagnose(facts, levels, 1.0, row.key, guidance=2.5)) == {}
    assert "not examined: embedded guidance" in diagnose(facts, levels, 1.0, row.key).report
    card = sigmas(*row.reference["sigmas"], 0.0)
    assert severities(diagnose(facts, card, 1.0, row.key)) == {"unshifted": "error"}


@pytest.mark.case("sampling 2", "video shift 6 and sound 3 are the 768p LoRAs' own; a dropped one is found")
@pytest.mark.case("sampling D7", "what the Doctor repairs keeps a shift of the sound")
def test_minimax_at_its_makers_shift():
    set_up = dict(patched=True, shift_alpha=6.0, native_shift_alpha=12.0)
    right = diagnose(model(MINIMAX.key, **set_up), preset_sigmas(MINIMAX, 4), 1.0)
    assert severities(right) == {"which_file": "note"} and not right.restore_model
    dropped = diagnose(model(MINIMAX.key, **set_up, audio_shift=None), preset_sigmas(MINIMAX, 4), 1.0, MINIMAX.key)
    assert severities(dropped) == {"audio_shift": "error"}
    assert dropped.restore_model and dropped.audio_shift == 3 and dropped.shift_alpha == pytest.approx(6, abs=0.01)


@pytest.mark.case("sampling 8", "a list that ends above 0 is told to be the first part of one, and what it does alone")
def test_a_second_stage_that_never_reaches_0():
    found = diagnose(model(LTX.key), sigmas(0.909375, 0.725, 0.421875), 1.0)
    assert severities(found) == {"open_end": "note"} and "leaves that much noise" in found.report
    assert found.sigmas.tolist() == pytest.approx([0.909375, 0.725, 0.421875])
    with pytest.raises(ValueError, match="must end in 0"):
        make_recipe(model(LTX.key), sigmas=sigmas(0.909375, 0.725, 0.421875))


@pytest.mark.case("sampling 9", "LTX-2's list shifted and stretched a second time is named as that")
def test_a_list_that_was_processed_twice():
    stretched = sigmas(1, 0.9997, 0.9993, 0.9989, 0.9986, 0.9945, 0.9794, 0.9297, 0.1, 0)
    found = diagnose(model(LTX.key), stretched, 1.0, LTX.key)
    assert severities(found) == {"other_list": "error", "steps": "warning"} and "shift_terminal" in found.report
    assert found.sigmas.tolist() == pytest.approx(preset_sigmas(LTX).tolist())
    levels = preset_sigmas(LTX).double()[1:-1]
    again = torch.cat([torch.ones(1), (7.8 * levels / (1 + 6.8 * levels)).float(), torch.zeros(1)])
    assert severities(diagnose(model(LTX.key), again, 1.0, LTX.key)) == {"shift_twice": "error"}


@pytest.mark.case("sampling 10", "the second stages and the temporal round of LTX-2, 2.3 and 2.5 are known parts")
@pytest.mark.parametrize(
    "levels", [(0.909375, 0.725, 0.421875, 0), (0.975, 0.909375, 0.725, 0.421875, 0), (0.85, 0.725, 0.4219, 0)]
)
def test_stages_of_ltx(levels):
    found = diagnose(model(LTX.key), sigmas(*levels), 1.0)
    assert severities(found) == {} and found.sigmas.tolist() == pytest.approx(levels, abs=1e-3)


@pytest.mark.case("sampling 11", "hand-made passes of Z-Image-Turbo are warned of and keep their ends")
def test_hand_made_passes():
    for levels in [(0.991, 0.98, 0.92), (0.935, 0.88, 0.62, 0.2), (0.6, 0.31, 0.0)]:
        found = diagnose(model("z-image-turbo"), sigmas(*levels), 1.0)
        assert "error" not in severities(found).values()
        assert found.sigmas[[0, -1]].tolist() == pytest.approx([levels[0], levels[-1]])


@pytest.mark.case("sampling 11", "4 steps of Z-Image-Turbo are given with a note that 8 were trained, and who made 4")
@pytest.mark.case("sampling D13", "Z-Image-Turbo at half its steps is never without a finding")
def test_half_the_steps_of_z_image():
    facts = model("z-image-turbo")
    recipe = make_recipe(facts, steps=4)
    assert "Made for 8 steps; 4 follow the same rule" in recipe.explanation and "z-image-tdm-r1" in recipe.explanation
    found = diagnose(facts, recipe.sigmas, 1.0)
    assert severities(found) == {"steps": "note"} and "TDM-R1" in found.report


@pytest.mark.case("sampling 12", "8 steps of Wan 2.2 Lightning are its maintainer's list, with a note; 16 are refused")
def test_more_steps_of_wan_lightning():
    recipe = make_recipe(model("wan2.2-lightning"), "wan2.2-lightning", 8, video=True)
    said = [1, 0.9722224, 0.9375001, 0.8928571, 0.8333333, 0.7500001, 0.625, 0.4166667, 0]
    assert recipe.sigmas.tolist() == pytest.approx(said, abs=1e-4) and "were not trained" in recipe.explanation
    with pytest.raises(ValueError, match="made for 4 steps, not 16"):
        make_recipe(model("wan2.2-lightning"), "wan2.2-lightning", 16, video=True)


@pytest.mark.case("sampling 13", "shift 8 on a LoRA for 5 is an error that names the shift to set; 6 steps at 5 a note")
def test_wan_at_the_bases_shift():
    native = dict(shift_alpha=8.0, native_shift_alpha=8.0)
    found = diagnose(model("wan2.1-lightx2v", **native), shifted_sigmas(4, shift_alpha=8.0), 1.0)
    assert severities(found) == {"other_shift": "error"} and "set the shift to 5" in found.report
    six = diagnose(model("wan2.1-lightx2v"), shifted_sigmas(6, shift_alpha=5.0), 1.0)
    assert severities(six) == {"steps": "note"} and len(six.sigmas) == 7


@pytest.mark.case("sampling 10", "two experts: each half of Wan 2.2's list passes")
@pytest.mark.case("sampling D2", "a first part that ends at a trained level, and its second, are no faults")
def test_two_experts():
    whole = preset_sigmas(find_preset("wan2.2-lightning"))
    high, low = diagnose(model("wan2.2-lightning"), whole[:3], 1.0), diagnose(model("wan2.2-lightning"), whole[2:], 1.0)
    assert severities(high) == {"open_end": "note"} and severities(low) == {}


@pytest.mark.case("sampling D2", "SD3.5 Turbo's tail at denoise .5 is no fault and stays what it is")
def test_the_smallest_case_of_a_tail():
    found = diagnose(model("sd3.5-large-turbo"), sigmas(0.75, 0.5, 0.0), 1.0)
    assert severities(found) == {} and found.sigmas.tolist() == [0.75, 0.5, 0.0]


@pytest.mark.parametrize("key, steps", [("sd3.5-large-turbo", 4), ("flux-schnell", 4), ("z-image-turbo", 8)])
@pytest.mark.case("sampling D2", "BasicScheduler's lists at denoise .5 and .75 are ends of a longer list")
def test_what_core_makes_of_denoise(key, steps):
    row, facts = find_preset(key), model(key)
    for denoise in (0.25, 0.5, 0.75):
        levels = shifted_sigmas(int(steps / denoise), shift_alpha=row.grid["alpha"])[-steps - 1 :]
        found = diagnose(facts, levels, 1.0)
        assert severities(found) == {} and torch.allclose(found.sigmas, levels, atol=1e-3)


@pytest.mark.case("sampling 14", "a turbo preset without its LoRA, and a LoRA of which no key fitted, are found")
@pytest.mark.case("sampling D6", "a base model at 4 steps and cfg 1 is never told to be without fault")
def test_no_lora_on_the_model():
    for key in ("qwen-image-lightning-4", "wan2.1-lightx2v", "minimax-h3-turbo"):
        facts = model(key, strengths=())
        assert severities(diagnose(facts, preset_sigmas(find_preset(key)), 1.0))["no_lora"] == "warning"
        assert "WARNING: this preset is a LoRA" in make_recipe(facts, video=find_preset(key).video).explanation
        plain = diagnose(facts, shifted_sigmas(20, shift_alpha=3.0), 4.0)
        assert severities(plain) == {"no_lora": "warning"} and len(plain.sigmas) == 21
    unfit = TurboLora("turbo.safetensors", {"turbo_distill.sigmas": "[1.0]"}, layers=0)
    found = diagnose(model("flux-schnell", loras=(unfit,)), preset_sigmas(find_preset("flux-schnell")), 1.0)
    assert severities(found) == {"lora_not_on": "error"}
    other = TurboLora("turbo.safetensors", {"turbo_distill.family": "sd3", "turbo_distill.sigmas": "[1.0]"}, layers=3)
    found = diagnose(model("flux-schnell", loras=(other,)), preset_sigmas(find_preset("flux-schnell")), 1.0)
    assert severities(found) == {"other_family": "error"}


def test_the_strength_of_a_lora():
    row = find_preset("hyper-flux-lora")
    found = diagnose(model(row.key, strengths=(1.0,)), preset_sigmas(row), 1.0, row.key, 1024, 1024, row.guidance)
    assert severities(found) == {"lora_strength": "warning"} and "trained for 0.125" in found.report
    both = model(row.key, strengths=(0.125, 0.8))
    assert severities(diagnose(both, preset_sigmas(row), 1.0, row.key, 1024, 1024, row.guidance)) == {}


@pytest.mark.case("sampling 16", "Anima Turbo has a preset, and Chroma Flash says what its users set in KSampler")
def test_anima_and_chroma():
    assert make_recipe(model("anima-turbo")).sigmas.tolist() == pytest.approx(
        shifted_sigmas(8, shift_alpha=3.0).tolist()
    )
    assert in_ksampler(find_preset("chroma1-flash")) == "KSampler: heun, beta, 8 steps, cfg 1"


@pytest.mark.case("sampling 17", "HiDream-O1 Dev's noise scale is a field, and another one is found")
def test_the_noise_scale_of_hidream():
    row = find_preset("hidream-o1-dev")
    levels = preset_sigmas(row)
    assert severities(diagnose(model(row.key, noise_scale=7.5), levels, 1.0)) == {}
    assert severities(diagnose(model(row.key, noise_scale=8.0), levels, 1.0)) == {"noise_scale": "warning"}


@pytest.mark.case("sampling 18", "2-step and 6-step turbo LoRAs of Qwen-Image are recognised and not mended to 4 steps")
@pytest.mark.parametrize("key, steps", [("qwen-image-2512-turbo-2", 2), ("qwen-image-2.1-viggle", 6)])
def test_other_step_counts_of_qwen(key, steps):
    found = diagnose(model(key), preset_sigmas(find_preset(key)), 1.0)
    assert severities(found) == {"which_file": "note"} and len(found.sigmas) == steps + 1


@pytest.mark.case("sampling D10", "FLUX.2 dev is not klein: auto asks, and a plain run is not compared with it")
def test_flux2_dev_is_not_klein():
    dev = model("flux2-dev-turbo-lora", strengths=())
    with pytest.raises(ValueError, match="choose the one.*flux2-dev-turbo-lora"):
        make_recipe(dev)
    plain = diagnose(dev, shifted_sigmas(20, shift_mu=2.02), 1.0)
    assert severities(plain) == {} and "Nothing to compare with" in plain.report and "No fault" not in plain.report
    assert make_recipe(model("flux2-klein")).sigmas[1] == pytest.approx(0.9674, abs=1e-3)


@pytest.mark.case("sampling D10", "Wan 2.2 5B is not taken for the 14B that lightx2v's LoRAs are for")
def test_wan_5b_is_a_family_of_its_own():
    facts = ModelFacts("wan2.2-5b", FlowProcess())
    with pytest.raises(ValueError, match="connect SIGMAS"):
        make_recipe(facts)


@pytest.mark.case("sampling D16", "the official LCM workflow's prediction is no fault of an LCM LoRA")
def test_lcm_prediction():
    row = find_preset("lcm-lora")
    found = diagnose(model(row.key, prediction="lcm"), preset_sigmas(row, 5), 1.8, row.key)
    assert severities(found) == {}


@pytest.mark.case("sampling 15", "Krea 2 Turbo behind ModelSamplingFlux at 2048 or 768 px is found and mended")
@pytest.mark.parametrize("alpha", [25.3, 2.33])
def test_krea_turbo_behind_a_shift_node(alpha):
    facts = model("krea2-turbo", patched=True, shift_alpha=alpha, native_shift_alpha=math.exp(1.15))
    found = diagnose(facts, shifted_sigmas(8, shift_alpha=alpha), 1.0)
    assert severities(found) == {"other_shift": "error", "extra_shift_node": "error"} and found.restore_model
    assert found.sigmas.tolist() == pytest.approx(preset_sigmas(find_preset("krea2-turbo")).tolist())


# Cases found later.


@pytest.mark.case("sampling new 1 (CSU-JPG/Glance#4)", "a slow and a fast LoRA in one run: both parts are known")
def test_two_loras_in_one_run():
    row = find_preset("glance")
    whole = preset_sigmas(row)
    slow, fast = (diagnose(model(row.key), part, 4.0, row.key) for part in (whole[:6], whole[5:]))
    assert severities(slow) == {"open_end": "note"} and severities(fast) == {}
    assert whole[5].item() == pytest.approx(0.8867, abs=1e-4)


@pytest.mark.case(
    "sampling new 2 (Acly/krita-ai-diffusion#670)", "8-step Lightning at half denoise: 16 steps' end is told as such"
)
def test_lightning_at_half_denoise():
    row, facts = find_preset("sdxl-lightning"), model("sdxl-lightning")
    process = facts.process
    timesteps = torch.tensor([499 - 62.5 * i for i in range(8)])
    longer = torch.cat([process.sigma(timesteps), torch.zeros(1)])
    found = diagnose(facts, longer, 1.0, row.key)
    assert severities(found) == {} and "longer list of the same rule" in found.report
    snapped = make_recipe(facts, row.key, 8, denoise=0.5).sigmas
    assert len(snapped) == 5 and severities(diagnose(facts, snapped, 1.0, row.key)) == {}


@pytest.mark.case("sampling new 3 (mflux-community/mflux#465)", "Krea 2 Turbo at the base's shift is found")
def test_krea_turbo_at_the_bases_shift():
    found = diagnose(model("krea2-turbo"), shifted_sigmas(8, shift_alpha=2.475), 1.0)
    assert severities(found) == {"other_shift": "error"} and "2.475" in found.report


@pytest.mark.case("sampling new 4 (bghira/SimpleTuner#622)", "schnell on levels of another paper's training is mended")
def test_schnell_on_training_weights():
    found = diagnose(model("flux-schnell"), sigmas(1.0, 0.3, 0.2, 0.1, 0.0), 1.0)
    assert severities(found) == {"other_list": "error"} and found.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.case(
    "sampling new 5 (LBH-123-AI/Comfyui_Minimax_h3_latent_Upscaler#49)",
    "a scheduler at denoise .25 in place of a list: accepted as the end of a longer one, and kept at its start",
)
def test_a_scheduler_and_denoise_instead_of_a_list():
    levels = shifted_sigmas(16, shift_alpha=6.0)[-5:]
    found = diagnose(model(MINIMAX.key), levels, 1.0, MINIMAX.key)
    assert severities(found) == {} and found.sigmas[0] == levels[0] < 0.7


@pytest.mark.case("sampling new 6 (gazingstars123/Anima-Standalone-Trainer#75)", "Anima's unshifted list is named")
def test_anima_without_its_shift():
    found = diagnose(model("anima-turbo"), shifted_sigmas(8, shift_alpha=1.0), 1.0)
    assert severities(found) == {"unshifted": "error"} and math.isclose(found.sigmas[1].item(), 0.9545, abs_tol=1e-3)
