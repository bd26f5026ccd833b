"""The noises of an evaluation are nobody else's."""

import torch

from distill_core.diffusion.noise import ItemNoise, item_generator
from distill_core.diffusion.process import FlowProcess
from distill_core.evaluation.samples import EVALUATION, REFERENCE, evaluation_samples
from distill_core.models import mini
from distill_core.models.mini import mini_conditioning


def start_noises(count: int, **options) -> torch.Tensor:
    """The noises a model is started from, given back by one that returns what it gets."""

    def echo(x, sigma, cond):
        return x

    echo.process = FlowProcess()
    classes, _ = mini_conditioning()
    return evaluation_samples(echo, torch.tensor([1.0, 0.0]), classes, mini.LATENT_SHAPE, count=count, **options)


def test_no_evaluation_noise_is_a_noise_of_a_dataset_of_any_seed():
    """The streams of 10 seeds x 500 items of a dataset, of an evaluation and of its reference all start elsewhere."""
    starts = [
        noise.initial_seed()
        for purpose in ("", EVALUATION, REFERENCE)
        for seed in range(10)
        for noise in ItemNoise(seed, range(500), purpose).generators
    ]
    assert len(set(starts)) == 3 * 10 * 500


def test_the_noises_are_those_of_the_named_stream():
    noises = start_noises(12, seed=5, size=5)
    assert torch.equal(noises, ItemNoise(5, range(12), EVALUATION).normal(*mini.LATENT_SHAPE))
    dataset = ItemNoise(5, range(12)).normal(*mini.LATENT_SHAPE)
    reference = start_noises(12, seed=5, purpose=REFERENCE)
    for other in (dataset, reference):
        assert not (noises.flatten(1)[:, None, :8] == other.flatten(1)[None, :, :8]).any()


def test_a_name_makes_another_stream():
    assert ItemNoise(0, [3], EVALUATION).generators[0].initial_seed() != item_generator(0, 3).initial_seed()
