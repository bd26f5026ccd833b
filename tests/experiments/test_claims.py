"""Claims of the papers: an ordering is decided only where the seeds' ranges do not touch."""

import pytest

from distill_core.experiments.claims import CLAIMS, FAILS, HOLDS, OPEN, Claim, Order, claims_table
from distill_core.experiments.entries import ENTRIES


def runs(*values: float, metric: str = "fd") -> list[dict]:
    return [{"scores": {"1": {metric: value}}} for value in values]


A, B = ("a", "1"), ("b", "1")


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ((1.0, 2.0, 3.0), (3.1, 4.0, 5.0), HOLDS),
        ((1.0, 2.0, 3.2), (3.1, 4.0, 5.0), OPEN),
        ((6.0, 7.0, 8.0), (3.1, 4.0, 5.0), FAILS),
        ((1.0, 2.0), (3.1, 4.0, 5.0), OPEN),
    ],
)
def test_verdicts(a, b, verdict):
    results = {"a": runs(*a), "b": runs(*b)}
    assert Order(A, B).verdict(results) == verdict
    mirrored = {name: runs(*(-v for v in values)) for name, values in (("a", a), ("b", b))}
    assert Order(A, B, higher=True).verdict(mirrored) == verdict


def test_not_beaten_is_less_than_better():
    touching = {"a": runs(1.0, 2.0, 3.2), "b": runs(3.1, 4.0, 5.0)}
    assert Order(A, B, ties_allowed=True).verdict(touching) == HOLDS
    assert Order(B, A, ties_allowed=True).verdict({"a": runs(1.0, 2.0, 3.0), "b": runs(3.1, 4.0, 5.0)}) == FAILS


def test_an_older_result_without_the_measure_decides_nothing():
    results = {"a": runs(1.0, 2.0, 3.0), "b": runs(4.0, 5.0, 6.0, metric="drift")}
    assert Order(A, B).verdict(results) == OPEN


def test_the_table_shows_both_sides(monkeypatch):
    monkeypatch.setattr("distill_core.experiments.claims.CLAIMS", [Claim(1, "a beats b", [Order(A, B)])])
    lines = claims_table({"a": runs(1.0, 2.0, 3.0)}).splitlines()
    assert lines[2] == "| 1 | a beats b | fd | a, 1 step: 2.00 (1.00-3.00) < b, 1 step: not run | not decided |"


def test_every_claim_is_about_entries_that_are_run():
    for claim in CLAIMS:
        for order in claim.orders:
            for name, steps in (order.better, order.worse):
                assert name == "teacher" or int(steps) in ENTRIES[name].steps
