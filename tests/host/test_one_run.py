"""There is one way to make, log, end and save a run: the command's and the button's are the same to the last bit."""

from __future__ import annotations

import json

import pytest
from server import run_probe


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    """What probe_one_run.py finds."""
    printed = run_probe("probe_one_run.py", tmp_path_factory.mktemp("probe"))
    return json.loads(printed.splitlines()[-1])


def test_headless_and_graph_give_the_same_student(probe):
    """Weights, metadata, log, checkpoint and report of the same run on the same model."""
    assert probe["names"] and probe["weights"] == [] and probe["trained"] > 0
    assert probe["metadata"] == {}
    assert probe["log"] and probe["steps"] == 4
    assert probe["checkpoint"] == [] and probe["state"] and probe["report"]


def test_from_the_button_to_the_optimizer_few_files_are_open(probe):
    """tests/files_of_a_step.py says what is counted."""
    files = probe["files"]["open"]
    print(len(files), files, len(probe["files"]["step"]), len(probe["files"]["all"]))
    assert {"nodes/trainers/base.py", "nodes/host/training.py", "distill_core/training/run.py"} < set(files)
    assert len(files) <= 14
