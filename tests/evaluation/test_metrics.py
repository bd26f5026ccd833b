import numpy as np
import pytest
import scipy.linalg
import torch

from distill_core.evaluation.metrics import (
    MiniEvaluator,
    fd_between,
    features_and_accuracy,
    frechet_distance,
    trained_on,
)
from distill_core.models import mini


def moments(seed: int, dim: int = 12, rank: int | None = None):
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(dim, rank or dim, generator=g, dtype=torch.float64)
    return torch.randn(dim, generator=g, dtype=torch.float64), half @ half.T / dim


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_textbook_formula(seed):
    (mean_a, a), (mean_b, b) = moments(seed), moments(seed + 10)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = ((mean_a - mean_b) ** 2).sum().item() + np.trace(a.numpy() + b.numpy() - 2 * root.real)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-9)


def test_closed_forms():
    mean, cov = moments(0)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(4 * 12)
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])  # diagonal: sum of (sqrt a - sqrt b)^2
    zero = torch.zeros(3)
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(1 + 0 + 4)
    assert frechet_distance(zero, torch.zeros(3, 3), zero, b.diag()) == pytest.approx(9)


def test_singular_covariances_give_no_nan():
    """Fewer samples than dimensions: the product of the covariances has eigenvalues at 0, some rounded below it."""
    (mean_a, a), (mean_b, b) = moments(1, rank=3), moments(2, rank=3)
    root = scipy.linalg.sqrtm((a @ b).numpy() + 1e-12 * np.eye(12))
    expected = ((mean_a - mean_b) ** 2).sum().item() + np.trace(a.numpy() + b.numpy() - 2 * root.real)
    assert frechet_distance(mean_a.float(), a.float(), mean_b, b) == pytest.approx(expected, rel=1e-4)


def test_distance_between_sets_uses_their_moments():
    a, b = (torch.randn(50, 4, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in (0, 1))
    covs = [torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)) for x in (a, b)]
    expected = frechet_distance(a.double().mean(0), covs[0], b.double().mean(0), covs[1])
    assert fd_between(a, b) == pytest.approx(expected, rel=1e-9) and fd_between(a, a) == pytest.approx(0, abs=1e-6)


def test_features_and_accuracy_do_not_depend_on_the_batches():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = mini.new_classifier("latent").eval()
    x = torch.randn(23, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    predicted = net(x).argmax(1)
    labels = predicted.clone()
    labels[:5] = (labels[:5] + 1) % 10
    features, accuracy = features_and_accuracy(net, x, labels, size=7)
    assert accuracy == pytest.approx(18 / 23) and features.shape == (23, 64)
    torch.testing.assert_close(features, features_and_accuracy(net, x, labels)[0], atol=1e-5, rtol=1e-4)


def test_the_evaluator_reports_both_spaces():
    """Noise is far from the data in both, and a set at the reference's own moments would be at 0."""
    evaluator = MiniEvaluator()
    latents = torch.randn(20, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    scores = evaluator(latents, torch.arange(20) % 10)
    assert scores.keys() == {"fd", "accuracy", "diversity", "fd_pixels", "accuracy_pixels"}
    floor = mini.training_log()["floor"]
    assert scores["fd"] > 5 * floor["fd"] and scores["fd_pixels"] > 5 * floor["fd_pixels"]
    assert scores["accuracy"] < 0.5 and scores["diversity"] > 0
    assert evaluator.decode(latents, size=7).shape == (20, 3, 64, 64)


@pytest.mark.parametrize(
    "config, seen",
    [
        ({"add": {}, "vision": {"network": "efficientnet", "size": 64}}, True),
        ({"add": {}, "vision": {"network": "encoder", "size": 64}}, False),
        ({"add": {}, "vision": ["0123456789abcdef", 224]}, False),  # ComfyUI: a CLIP vision model, by its hash
        ({"ladd": {}, "discriminator": {"width": 64}}, False),  # a method that has no vision writes none
        ({"add": {}}, False),
    ],
)
def test_a_student_that_was_judged_by_the_evaluator_is_known_by_its_file(config, seen):
    assert trained_on({"sigmas": [1.0], "config": config}) == seen
    assert not trained_on({})
