"""Write workflows/*.json and their pictures from the sources in workflows.py:

    python tools/make_workflows.py [NAME ...]

With names, only those workflows are made. They go through the real frontend, which writes its own format, so this needs
ComfyUI, Node.js with playwright-core and Chromium (tests/host/server.py and browser.py say where they are looked for).
What runs on the mini model is run for its picture, the distil_mini_* in full (minutes).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests" / "host"), str(Path(__file__).parent)]

from browser import drive  # noqa: E402
from server import Host  # noqa: E402

from workflows import RUNS_ANYWHERE, WORKFLOWS, add_placeholders  # noqa: E402


def complete(workflow: dict, object_info: dict) -> dict:
    """Every widget with a value: those left out would keep that of the workflow which the page showed before."""

    def defaults(kind: str) -> dict:
        entries = [
            entry for part in object_info[kind]["input"].values() if isinstance(part, dict) for entry in part.items()
        ]
        return {key: given[1]["default"] for key, given in entries if len(given) > 1 and "default" in given[1]}

    return {name: {**node, "inputs": defaults(node["class_type"]) | node["inputs"]} for name, node in workflow.items()}


def numbered(workflow: dict) -> dict:
    """The frontend wants numbers for ids."""
    ids = {name: str(i + 1) for i, name in enumerate(workflow)}

    def value(given):
        return [ids[given[0]], given[1]] if isinstance(given, list) else given

    return {
        ids[name]: {**node, "inputs": {key: value(given) for key, given in node["inputs"].items()}}
        for name, node in workflow.items()
    }


def main(names: list[str]) -> None:
    out = REPO / "workflows"
    out.mkdir(exist_ok=True)
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-")))
    add_placeholders(host.base_dir)
    try:
        host.start()
        info = host.object_info()
        jobs = [
            {
                "name": name,
                "api": numbered(complete(workflow, info)),
                "save": str(out / f"{name}.json"),
                "picture": str(out / f"{name}.jpg"),
                "run": name in RUNS_ANYWHERE,
                "timeout": 3600,
            }
            for name, workflow in WORKFLOWS.items()
            if name in names or not names
        ]
        for result in drive(host.url, jobs, timeout=7200):
            print(
                result["name"], result["faults"] or "", result["errors"] or "", result.get("run", {}).get("event", "")
            )
    finally:
        host.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
