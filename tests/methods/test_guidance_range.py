"""Guidance that is drawn for each item, in every term that asks the guided teacher."""

from dataclasses import replace

import pytest
import torch
from toy import cache_toy, toy_method

from distill_core.diffusion.noise import ItemNoise
from distill_core.methods.add import ADDConfig
from distill_core.methods.dmd2 import MATCHING, DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.models.denoiser import Guided

ROWS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def started(config, dataset):
    method = toy_method(dataset, config)
    return method.start(dataset.batch(0, ROWS, 0), ItemNoise(3, range(ROWS)), 0)


ASKING = {
    "consistency": (LADDConfig({"consistency": 1.0}, consistency_share=1.0), "consistency_target"),
    "distillation": (ADDConfig({"distillation": 1.0}, space="latent"), "teacher_answer"),
    "distribution matching": (DMD2Config({MATCHING: 1.0}), "real_answer"),
    "distribution matching, adversarial": (DMD2Config({MATCHING: 1.0, "adversarial": 0.1}), "real_answer"),
}


@pytest.mark.parametrize("config, answer", ASKING.values(), ids=list(ASKING))
def test_each_item_has_its_own_guidance(dataset, config, answer):
    """A range of one value is that guidance, and in a wider one an item gets what its drawn guidance gives."""
    usual = getattr(started(config, dataset), answer)
    at_two = getattr(started(replace(config, guidance_range=(2.0, 2.0)), dataset), answer)
    torch.testing.assert_close(at_two, usual)  # the toy's own guidance is 2
    step = started(replace(config, guidance_range=(1.0, 6.0)), dataset)
    drawn, scales = getattr(step, answer), step.guided_teacher.scales
    assert scales.shape == (ROWS,) and scales.min() >= 1 and scales.max() <= 6 and len(scales.unique()) == ROWS
    for row in (0, 5):
        one = (scales[row].item(),) * 2
        alike = getattr(started(replace(config, guidance_range=one), dataset), answer)
        torch.testing.assert_close(drawn[row], alike[row])
    assert not torch.allclose(drawn, usual)


def test_items_of_one_batch_are_guided_by_their_own_scale(dataset):
    method = toy_method(dataset)
    batch, sigma = dataset.batch(0, 2, 0), torch.tensor([0.9, 0.4])
    guided = Guided(method.teacher, dataset.uncond(), 1.0, torch.tensor([1.0, 3.0]))
    answer = guided(batch.latents, sigma, batch.cond)
    with_text = method.teacher(batch.latents, sigma, batch.cond)
    strong = Guided(method.teacher, dataset.uncond(), 3.0)(batch.latents, sigma, batch.cond)
    torch.testing.assert_close(answer[0], with_text[0])
    torch.testing.assert_close(answer[1], strong[1])
    torch.testing.assert_close(guided.around(with_text, batch.latents, sigma, batch.cond), answer)


@pytest.mark.parametrize("bad", [(1.0,), (3.0, 1.0), (1.0, 2.0, 3.0), (-1.0, 2.0)])
def test_an_impossible_range_is_refused(bad):
    with pytest.raises(ValueError, match="guidance_range must be"):
        LADDConfig(guidance_range=bad)
