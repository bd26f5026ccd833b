"""Take the pictures of docs/walk.md: a stranger's walk in a real browser, against a fresh ComfyUI.

    python tools/make_walk.py [STEP ...]

It needs what make_workflows.py needs, and several minutes. walk.js has the steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests" / "host"), str(Path(__file__).parent)]

from browser import CHROMIUM, PLAYWRIGHT  # noqa: E402
from server import Host  # noqa: E402


def main(steps: list[str]) -> None:
    out = REPO / "docs" / "walk"
    out.mkdir(exist_ok=True)
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-")))
    environment = os.environ | {"NODE_PATH": str(PLAYWRIGHT / "node_modules"), "CHROMIUM": str(CHROMIUM)}
    try:
        host.start()
        subprocess.run(
            ["node", Path(__file__).with_name("walk.js"), host.url, out, *steps], env=environment, check=True
        )
    finally:
        host.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
