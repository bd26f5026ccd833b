"""Short versions of the commands in this folder; the long ones are in docs/archive/attack.md."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "host")]

import files  # noqa: E402
import kills  # noqa: E402
import settings  # noqa: E402
from outcomes import Outcomes  # noqa: E402
from server import HOST_FOUND, HOW_TO, Host  # noqa: E402


def test_damaged_files_end_in_a_sentence(tmp_path):
    outcomes = files.attack(tmp_path, 28, seed=1)
    assert not outcomes.bad, outcomes.failures
    assert outcomes.answered("our sentence") > 10


@pytest.mark.case("attack 7", "a killed command leaves no file, and goes on to the same bytes with each step once")
def test_killed_commands_end_the_same(tmp_path):
    outcomes = Outcomes("kill")
    kills.headless(tmp_path, 4, random.Random(0), outcomes)
    assert not outcomes.bad, outcomes.failures


@pytest.mark.skipif(not HOST_FOUND, reason=HOW_TO)
@pytest.mark.case("attack 1", "text that is no Unicode ends in a sentence, and the server goes on serving")
def test_random_settings_end_in_a_sentence_or_a_success(tmp_path):
    host = Host(tmp_path / "comfyui")
    try:
        host.start()
        outcomes = settings.attack(host, settings.TRAINERS, 10, seed=1)
    finally:
        host.stop()
    assert not outcomes.bad, outcomes.failures
    assert outcomes.answered("success") and outcomes.answered("our sentence")


def test_an_outcome_that_nobody_knows_is_a_failure():
    outcomes = Outcomes("x")
    outcomes.add("a", "success")
    outcomes.add("a", "raw TypeError", {"rank": []}, "TypeError: ...")
    assert outcomes.bad == 1 and outcomes.failures[0]["case"] == {"rank": []}
    assert "| a | 2 | 1 | 0 | 0 | 1 |" in outcomes.markdown()
