"""The real frontend in Chromium, driven by frontend.js.

$PLAYWRIGHT_PATH (default ~/comfy/browser) is a folder whose node_modules has playwright-core, $CHROMIUM (default
/usr/bin/chromium) the browser.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLAYWRIGHT = Path(os.environ.get("PLAYWRIGHT_PATH") or "~/comfy/browser").expanduser()
CHROMIUM = Path(os.environ.get("CHROMIUM") or "/usr/bin/chromium")
BROWSER_FOUND = bool(shutil.which("node")) and (PLAYWRIGHT / "node_modules").is_dir() and CHROMIUM.exists()


def drive(url: str, jobs: list[dict], timeout: float = 600.0) -> list[dict]:
    """Do the jobs (frontend.js says what they are) in the frontend at ``url`` and return what it reports of each."""
    with tempfile.TemporaryDirectory() as folder:
        todo, done = Path(folder, "jobs.json"), Path(folder, "result.json")
        todo.write_text(json.dumps(jobs))
        environment = os.environ | {"NODE_PATH": str(PLAYWRIGHT / "node_modules"), "CHROMIUM": str(CHROMIUM)}
        command = ["node", HERE / "frontend.js", url, todo, done]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        return json.loads(done.read_text())
