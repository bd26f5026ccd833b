"""Density and coverage against their definitions, and against what they are for samples like the reference."""

import pytest
import torch

from distill_core.evaluation.intervals import Bootstrap
from distill_core.evaluation.neighbours import NEIGHBOURS, neighbour_figures


def draw(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def values(features: torch.Tensor, examples: torch.Tensor) -> dict[str, float]:
    figures = neighbour_figures(features, examples, Bootstrap(len(features), repeats=0))
    return {name: figure.value for name, figure in figures.items()}


def test_the_definitions_by_loops():
    fake, real = draw(30, 0).double(), draw(25, 1).double()
    balls = []
    for x in real:
        apart = sorted((x - y).norm().item() for y in real)
        balls.append(apart[NEIGHBOURS])  # apart[0] is the distance to itself
    inside = [[(f - x).norm().item() <= r for x, r in zip(real, balls, strict=True)] for f in fake]
    found = values(fake, real)
    assert found["density"] == pytest.approx(sum(map(sum, inside)) / (NEIGHBOURS * len(fake)), rel=1e-6)
    assert found["coverage"] == pytest.approx(sum(map(any, zip(*inside, strict=True))) / len(real), rel=1e-6)


def test_samples_like_the_reference_and_samples_of_a_part_of_it():
    reference = draw(600, 0)
    alike, crowded, half = (values(x, reference) for x in (draw(600, 1), draw(600, 2, 0.3), draw(600, 3).abs()))
    assert alike["coverage"] == pytest.approx(1 - 2**-NEIGHBOURS, abs=0.03)
    assert alike["density"] == pytest.approx(1, abs=0.1)
    assert crowded["density"] > alike["density"] + 0.1 and crowded["coverage"] < 0.5  # the middle only
    assert half["coverage"] < 0.5


def test_a_resample_counts_a_sample_as_often_as_it_is_in_it():
    fake, real = draw(20, 0), draw(15, 1)
    bootstrap = Bootstrap(20, repeats=3)
    figures = neighbour_figures(fake, real, bootstrap)
    for row, counts in enumerate(bootstrap.counts.long()):
        again = values(fake.repeat_interleave(counts, 0), real)
        assert {name: figures[name].replicates[row].item() for name in again} == pytest.approx(again, rel=1e-5)


def test_intervals_cover_what_such_sets_have_on_average():
    reference = draw(150, 0)
    sets = [neighbour_figures(draw(150, 10 + i, 0.8), reference, Bootstrap(150, repeats=150)) for i in range(100)]
    for name in ("density", "coverage"):
        average = sum(s[name].value for s in sets) / len(sets)
        covered = sum(low <= average <= high for s in sets for low, high in [s[name].interval()])
        assert 0.9 <= covered / len(sets) <= 1


def test_tiny_sets_are_no_error():
    assert values(draw(3, 0), draw(3, 0))["coverage"] == 1
