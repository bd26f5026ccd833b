import numpy as np
import pytest
import scipy.linalg
import torch

from distill_core.evaluation.frechet import Gaussian, frechet_distance, frechet_figure
from distill_core.evaluation.intervals import Bootstrap


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


def test_the_figure_of_a_set_uses_its_moments_and_a_resample_those_of_its_rows():
    """By numpy's moments of the repeated rows."""
    a, b = (torch.randn(50, 4, generator=torch.Generator().manual_seed(i)) * (i + 1) + i + 30 for i in (0, 1))
    bootstrap = Bootstrap(50, repeats=3)
    figure = frechet_figure(a, Gaussian.of(b), bootstrap)

    def brute_force(rows: torch.Tensor) -> float:
        (mean, cov), (mean_b, cov_b) = (
            (x.double().mean(0), torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))) for x in (rows, b)
        )
        return frechet_distance(mean, cov, mean_b, cov_b)

    assert figure.value == pytest.approx(brute_force(a), rel=1e-9)
    for counts, value in zip(bootstrap.counts, figure.replicates, strict=True):
        assert value.item() == pytest.approx(brute_force(a.repeat_interleave(counts.long(), 0)), rel=1e-5)
    assert frechet_figure(b, Gaussian.of(b), bootstrap).value == pytest.approx(0, abs=1e-6)


def test_the_interval_covers_the_truth_and_the_bias_is_that_of_the_count():
    """Gaussians of known moments: the interval covers what 200 items give on average, and less the bias it covers the
    distance of the distributions themselves, each in about 95 % of the cases."""
    generator, count, sets = torch.Generator().manual_seed(0), 200, 150
    factor = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 0.5]], dtype=torch.float64)
    reference = Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    truth = frechet_distance(torch.full((3,), 0.3), factor.T @ factor, reference.mean, reference.cov)
    bootstrap, figures = Bootstrap(count, repeats=150), []
    for _ in range(sets):
        x = torch.randn(count, 3, generator=generator, dtype=torch.float64) @ factor + 0.3
        figures.append(frechet_figure(x, reference, bootstrap))
    average = sum(f.value for f in figures) / sets
    bias = sum(f.bias for f in figures) / sets
    assert bias > 0 and bias == pytest.approx(average - truth, abs=0.015)
    for of, shift in ((average, lambda f: 0.0), (truth, lambda f: f.bias)):
        covered = sum(low - shift(f) <= of <= high - shift(f) for f in figures for low, high in [f.interval()])
        assert 0.88 <= covered / sets <= 0.99


def test_the_bias_cancels_in_a_difference_of_equal_counts():
    """Two models that are equally good, of 150 items each: both are too large, their difference is not."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(150, 8, generator=generator) for _ in range(2))
    reference = Gaussian(torch.zeros(8), torch.eye(8))
    one, other = (frechet_figure(x, reference, Bootstrap(150)) for x in (a, b))
    assert one.bias > 0.1 and other.bias > 0.1 and abs((one - other).bias) < 0.3 * one.bias
    low, high = (one - other).interval()
    assert low < 0 < high
