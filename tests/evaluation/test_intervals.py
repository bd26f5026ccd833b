"""Bootstrap intervals: right by formulas where there are some, and by simulation."""

import math

import pytest
import torch

from distill_core.evaluation.intervals import Bootstrap, Figure


def test_the_interval_of_a_mean_is_the_textbooks():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    figure = Bootstrap(4000).of_mean(values)
    low, high = figure.interval()
    assert figure.value == pytest.approx(values.mean().item(), rel=1e-6)
    assert figure.bias == pytest.approx(0, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * 3 / math.sqrt(4000), rel=0.1)
    assert (low + high) / 2 == pytest.approx(figure.value, abs=0.02)
    wide = figure.interval(0.99)
    assert wide[0] < low < high < wide[1]


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator, bootstrap, covered = torch.Generator().manual_seed(1), Bootstrap(150), 0
    for _ in range(400):
        low, high = bootstrap.of_mean(torch.rand(150, generator=generator).square()).interval()
        covered += low <= 1 / 3 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_a_difference_is_paired():
    """What two models have in common, item by item, drops out: the difference is far surer than either figure, and it
    is the bootstrap of the items' differences."""
    generator = torch.Generator().manual_seed(2)
    common, own = torch.randn(1000, generator=generator), 0.05 * torch.randn(1000, generator=generator)
    a, b = Bootstrap(1000).of_mean(common), Bootstrap(1000).of_mean(common + own + 0.02)  # two processes
    apart = b - a
    low, high = apart.interval()
    assert 0 < low < high and high - low < 0.1 * (a.interval()[1] - a.interval()[0])
    direct = Bootstrap(1000).of_mean(own + 0.02)
    torch.testing.assert_close(apart.replicates, direct.replicates, atol=1e-5, rtol=1e-4)


def test_strata_keep_the_classes_shares():
    """Equally many of each class are drawn, so what differs between classes is no uncertainty."""
    labels = torch.arange(1003) % 10
    stratified = Bootstrap(1003, strata=10)
    assert stratified.counts.sum(1).unique().tolist() == [1003]
    for label in range(10):
        inside = stratified.counts[:, labels == label]
        assert inside.sum(1).unique().tolist() == [(labels == label).sum()] and inside.max() > 1
    low, high = stratified.of_mean(labels.float()).interval()
    assert high - low == pytest.approx(0, abs=1e-5)


def test_figures_of_other_resamples_are_refused():
    with pytest.raises(ValueError, match="400 and 3 resamples"):
        Figure(1.0, torch.zeros(400)) - Figure(1.0, torch.zeros(3))


def test_without_resamples_there_is_a_value_and_no_interval():
    figure = Bootstrap(5, repeats=0).of_mean(torch.arange(5.0))
    assert figure.value == 2 and figure.bias == 0 and all(math.isnan(end) for end in figure.interval())


def test_words_and_numbers():
    figure = Figure(2.0, torch.linspace(1.0, 3.0, 401))
    assert f"{figure:.2f}" == "2.00 [1.05, 2.95]"
    assert figure.plain() == {"value": 2.0, "low": 1.05, "high": 2.95}
