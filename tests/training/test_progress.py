"""Pace: how far a count is, at most so often, by the time of what is made now."""

from __future__ import annotations

import pytest

from distill_core.training import progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in its one entry."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_that_of_what_is_made_now(clock):
    """600 of 1000 were there: 2 s for each of the next."""
    said: list[str] = []
    pace = progress.Pace("latents", 10.0, said.append)
    clock[0] += 50
    pace.there(600)
    for done in range(601, 607):
        clock[0] += 2
        pace(done, 1000)
    assert said == ["latents: 605 of 1000, 2 s each, 0:13:10 left"]


def test_the_end_is_said_in_any_case(clock):
    said: list[str] = []
    pace = progress.Pace("latents", 10.0, said.append)
    clock[0] += 1
    pace(4, 4)
    assert said == ["latents: 4 of 4, 0.25 s each, 0:00:00 left"]
