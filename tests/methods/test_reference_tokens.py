"""Noise levels by the size of the latents: every level of a batch is shifted, and nothing else changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy import LEVELS, cache_toy, toy_method

from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import shift_sigmas, size_shift
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.tune import TuneConfig
from distill_core.models.denoiser import Limits
from distill_core.training.run import pairs_notes, reference_pixels

SIZES = ((4, 6), (8, 12))  # 24 and 96 tokens: levels are shifted by 2

EVERY = {"adversarial": 1.0, "distillation": 1.0, "pairs": 1.0, "consistency": 1.0, "denoising": 1.0}


def noise() -> ItemNoise:
    return ItemNoise(0, range(8))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    dataset = cache_toy(tmp_path_factory.mktemp("data"), count=32, sizes=SIZES)
    found = [dataset.batch(number, 8, 0) for number in range(4)]
    return [next(b for b in found if b.latents.shape[-2:] == size) for size in SIZES]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("one size"), count=32, sizes=SIZES)


def test_the_factor_is_that_of_stable_diffusion_3():
    assert (
        size_shift(4096, 1024) == 2
    )  # 1024 x 1024 pixels beside 512 x 512, figure 6 of the paper has 3 beside 256 x 256
    level = shift_sigmas(torch.tensor(0.5), shift_alpha=size_shift(4096, 1024))
    assert level.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("config", [LADDConfig(EVERY), DMD2Config(own_share=0.5)], ids=["ladd", "dmd2"])
def test_at_the_reference_nothing_changes(dataset, batches, config):
    plain, told = (
        toy_method(dataset, c).start(batches[0], noise(), 999) for c in (config, replace(config, reference_tokens=24))
    )
    assert torch.equal(plain.sigma, told.sigma) and torch.equal(plain.fake, told.fake)
    names = ["renoise_sigma"] if config.name == "dmd2" else ["renoise_sigma", "teacher_sigma", "consistency_target"]
    for name in names:
        assert torch.equal(getattr(plain, name), getattr(told, name)), name


@pytest.mark.parametrize("name", ["renoise_sigma", "teacher_sigma", "sigma"])
def test_every_level_of_a_larger_latent_is_shifted(dataset, batches, name):
    for terms in ({"adversarial": 1.0}, {"denoising": 1.0}, {"adversarial": 1.0, "consistency": 1.0}):
        config = LADDConfig(terms, renoise_mean=0.3)
        plain, told = (
            toy_method(dataset, c).start(batches[1], noise(), 999)
            for c in (config, replace(config, reference_tokens=24))
        )
        torch.testing.assert_close(getattr(told, name), shift_sigmas(getattr(plain, name), shift_alpha=2.0))
    gained = torch.logit(told.renoise_sigma.double()) - torch.logit(plain.renoise_sigma.double())
    torch.testing.assert_close(gained, torch.full_like(gained, math.log(2)), atol=1e-4, rtol=0)  # m + ln a


def test_other_methods_shift_their_noise_too(dataset, batches):
    plain, told = (
        toy_method(dataset, DMD2Config(reference_tokens=tokens)).start(batches[1], noise(), 0) for tokens in (0, 24)
    )
    torch.testing.assert_close(told.renoise_sigma, shift_sigmas(plain.renoise_sigma, shift_alpha=2.0))


def test_pairs_count_where_the_shifted_level_is_stored(dataset, batches):
    config = LADDConfig({"pairs": 1.0}, probabilities=(1.0,) * 4, reference_tokens=24)
    method = toy_method(dataset, config)
    assert method.levels_of(batches[0]) == LEVELS
    step = method.start(batches[1], noise(), 999)
    assert torch.equal(step.on_path, step.sigma == 1) and step.on_path.any() and not step.on_path.all()
    (note,) = pairs_notes(config, dataset, FlowProcess(), Limits())
    assert "on latents of 12 x 8: 0.857143, 0.666667, 0.4 of 1, 0.857143, 0.666667, 0.4 have no pairs" in note
    assert pairs_notes(replace(config, reference_tokens=0), dataset, FlowProcess(), Limits()) == []


def test_the_file_says_the_reference_in_pixels():
    assert reference_pixels(LADDConfig(reference_tokens=1024), Limits(patch=2)) == {"reference_pixels": 512**2}
    assert reference_pixels(LADDConfig(), Limits(patch=2)) == {}


def test_models_that_count_timesteps_are_refused():
    process = DiscreteProcess(cumulative_alphas())
    with pytest.raises(ValueError, match="reference_tokens shifts the noise levels of flow models .*set it to 0"):
        LADDConfig(reference_tokens=64).levels(process)
    assert LADDConfig().levels(process)


def test_a_turbo_keeps_its_levels():
    with pytest.raises(ValueError, match="a turbo keeps its levels at every size: set it to 0"):
        TuneConfig(reference_tokens=64)
