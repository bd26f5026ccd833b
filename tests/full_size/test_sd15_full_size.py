"""SD 1.5 at full size with random weights: two steps of its workflow's graph in the host; about 5 GB of memory."""

from __future__ import annotations

import math

import pytest
from full_graphs import ROWS, quick
from run_full_size import STOPPED, Session
from server import HOST_FOUND

pytestmark = pytest.mark.skipif(not HOST_FOUND, reason="ComfyUI not found")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("full_size") / "host"
    try:
        return Session(quick(ROWS["sd15"], 2), folder).run()
    finally:
        for file in (folder / "models" / "checkpoints").glob("*.safetensors"):
            file.unlink()  # 1.7 GB, which the tests' folder would keep


def test_a_random_teacher_is_refused_by_name(found):
    """Its samples are still the noise that they began as; and the widget that passes it lets the run pass."""
    assert STOPPED in found["preflight"] and "wrong latent scale" in found["preflight"]


def test_two_steps_and_their_memory(found):
    assert [entry["step"] for entry in found["losses"]] == [1, 2]
    assert all(math.isfinite(v) for entry in found["losses"] for v in entry.values() if isinstance(v, float))
    assert 3.0 < found["peak GB"] < 6.5


def test_the_host_reads_every_key_of_the_lora(found):
    """Two matrices and an alpha for each of the 160 linear layers of the transformers."""
    assert found["LoRA keys"] == 480 and found["keys not loaded"] == 0


def test_the_merged_lora_is_the_student(found):
    """Made so strong that it changes half of the answer: more than the rounding of merged weights does."""
    assert found["change"] > 1e-5
    assert found["strong change"] > 0.1 and found["strong error"] < 0.02
