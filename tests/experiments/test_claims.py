"""Claims of the papers: an ordering is decided by the interval of its difference in every seed."""

import pytest
import torch

from distill_core.evaluation.intervals import Bootstrap, Figure
from distill_core.experiments.claims import CLAIMS, FAILS, HOLDS, OPEN, Claim, Order, cell, claims_table
from distill_core.experiments.entries import ENTRIES

NOISE = torch.linspace(-1, 1, 401) - 0.0  # the interval of a difference is +-0.95 where one side has it


def figure(value: float, spread: float = 0.0) -> Figure:
    return Figure(value, value + spread * NOISE)


def runs(*values: float, metric: str = "fd", spread: float = 0.0) -> list[dict]:
    return [{"seed": seed, "scores": {"1": {metric: figure(v, spread)}}} for seed, v in enumerate(values)]


A, B = ("a", "1"), ("b", "1")


@pytest.mark.parametrize(
    "a, verdict",
    [
        ((1.0, 2.0, 3.0), HOLDS),
        ((1.0, 2.0, 4.2), OPEN),  # in the third seed the interval of the difference holds 0
        ((6.1, 7.0, 8.0), FAILS),
        ((6.1, 7.0, 5.5), OPEN),
        ((1.0, 2.0), OPEN),
    ],
)
def test_verdicts(a, verdict):
    results = {"a": runs(*a, spread=1.0), "b": runs(5.0, 5.0, 5.0)}
    assert Order(A, B).verdict(results) == verdict
    mirrored = {"a": runs(*(-v for v in a), spread=1.0), "b": runs(-5.0, -5.0, -5.0)}
    assert Order(A, B, higher=True).verdict(mirrored) == verdict


def test_more_images_decide_what_few_cannot():
    """Two entries .1 apart on items that scatter by 1, with little in common."""
    generator = torch.Generator().manual_seed(0)

    def results(count: int) -> dict[str, list[dict]]:
        def one(shift: float) -> list[dict]:
            values = [torch.randn(count, generator=generator) + shift for _ in range(3)]
            return [{"seed": i, "scores": {"1": {"fd": Bootstrap(count).of_mean(v)}}} for i, v in enumerate(values)]

        return {"a": one(0.0), "b": one(0.1)}

    assert Order(A, B).verdict(results(200)) == OPEN and Order(A, B).verdict(results(10_000)) == HOLDS


def test_what_is_common_to_both_does_not_count():
    """Both figures are uncertain by 1, but together: their difference is not."""
    results = {"a": runs(4.9, 4.9, 4.9, spread=1.0), "b": runs(5.0, 5.0, 5.0, spread=1.0)}
    assert Order(A, B).verdict(results) == HOLDS


@pytest.mark.parametrize("a, verdict", [((1.0, 2.0, 5.5), HOLDS), ((6.1, 7.0, 8.0), FAILS), ((1.0, 2.0, 6.5), OPEN)])
def test_not_beaten_is_less_than_better(a, verdict):
    results = {"a": runs(*a, spread=1.0), "b": runs(5.0, 5.0, 5.0)}
    assert Order(A, B, ties_allowed=True).verdict(results) == verdict


def test_the_teacher_is_compared_with_every_seed():
    teacher = [{"seed": None, "scores": {"25": {"fd": figure(5.0)}}}]
    results = {"a": runs(1.0, 2.0, 3.0, spread=1.0), "teacher": teacher}
    order = Order(A, ("teacher", "25"))
    assert order.verdict(results) == HOLDS and list(order.differences(results)) == [0, 1, 2]


def test_an_older_result_without_intervals_or_the_measure_decides_nothing():
    results = {"a": runs(1.0, 2.0, 3.0), "b": runs(4.0, 5.0, 6.0, metric="drift")}
    assert Order(A, B).verdict(results) == OPEN
    old = [{"seed": i, "scores": {"1": {"fd": Figure(9.0, torch.zeros(0))}}} for i in range(3)]
    assert Order(A, B).verdict({"a": runs(1.0, 2.0, 3.0), "b": old}) == OPEN
    assert cell([run["scores"]["1"]["fd"] for run in old]) == "9.00"


def test_the_table_shows_both_sides_and_the_differences(monkeypatch):
    monkeypatch.setattr("distill_core.experiments.claims.CLAIMS", [Claim(1, "a beats b", [Order(A, B)])])
    lines = claims_table({"a": runs(1.0, 2.0, 3.0, spread=1.0)}).splitlines()
    assert lines[2] == "| 1 | a beats b | fd | a, 1 step: 2.00 [0.05, 3.95] < b, 1 step: not run |  | not decided |"
    lines = claims_table({"a": runs(1.0, 2.0, 3.0, spread=1.0), "b": runs(5.0, 5.0, 5.0)}).splitlines()
    assert lines[2].endswith("| -4.00 [-4.95, -3.05], -3.00 [-3.95, -2.05], -2.00 [-2.95, -1.05] | holds |")


def test_every_claim_is_about_entries_that_are_run():
    for claim in CLAIMS:
        for order in claim.orders:
            for name, steps in (order.better, order.worse):
                assert name == "teacher" or int(steps) in ENTRIES[name].steps
