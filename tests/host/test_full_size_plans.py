"""Plans of ComfyUI's networks at full size: a change of the code must not make a step larger unseen."""

from __future__ import annotations

import os
import subprocess

import pytest
from server import COMFYUI, PYTHON, REPO

SCRIPT = REPO / "tests" / "benchmarks" / "plan_full_size.py"
# Peak in GB, counted once by another script over the pack's own step; with the CUDA list of autocast, without context.
PEAKS = {"sd15 fp16": 2.59, "flux fp8 16": 20.68}


@pytest.mark.case("memory 4", "the planner finds the peaks of full-size steps that were counted by hand, within 3 %")
@pytest.mark.parametrize("row", PEAKS)
def test_a_step_at_full_size_is_as_large_as_it_was(tmp_path, row):
    environment = os.environ | {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([PYTHON, SCRIPT, tmp_path, row], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gigabytes = float(done.stdout.splitlines()[-1].split("(")[1].split(")")[0])
    assert gigabytes == pytest.approx(PEAKS[row], rel=0.03)
