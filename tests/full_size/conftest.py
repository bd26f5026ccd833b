"""Tests at full size need a ComfyUI; without one they are skipped, and the summary says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "host")]
from server import HOST_FOUND, HOW_TO  # noqa: E402


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not HOST_FOUND:
        terminalreporter.write_line(f"also for tests/full_size: {HOW_TO}", yellow=True, bold=True)
