"""Write workflows/*.json and their cards from the sources in workflows.py:

    python tools/make_workflows.py [NAME ...]

With names, only those workflows are made. They go through the real frontend, which writes its own format and says how
large the nodes are, so this needs ComfyUI, Node.js with playwright-core and Chromium (tests/host/server.py and
browser.py say where they are looked for). What runs on the mini model is run for the pictures on its card, the
distil_mini_* in full (minutes); --no-run leaves the cards as they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests" / "host"), str(Path(__file__).parent)]

from browser import drive  # noqa: E402
from cards import cards, draw_card  # noqa: E402
from finish_workflow import finished  # noqa: E402
from server import Host  # noqa: E402
from workflow_groups import title_of  # noqa: E402
from workflow_notes import notes  # noqa: E402

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
    """The frontend wants numbers for ids; with titles."""
    ids = {name: str(i + 1) for i, name in enumerate(workflow)}

    def value(given):
        return [ids[given[0]], given[1]] if isinstance(given, list) else given

    def named(key: str, node: dict) -> dict:
        title = title_of(key, node["class_type"])
        return node | ({"_meta": {"title": title}} if title else {})

    return {
        ids[name]: {**named(name, node), "inputs": {key: value(given) for key, given in node["inputs"].items()}}
        for name, node in workflow.items()
    }


def main(names: list[str]) -> None:
    run = "--no-run" not in names
    names = [name for name in names if name != "--no-run"] or list(WORKFLOWS)
    out, texts = REPO / "workflows", notes(WORKFLOWS)
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-")))
    add_placeholders(host.base_dir)
    try:
        host.start()
        info = host.object_info()
        jobs = [{"name": name, "api": numbered(complete(WORKFLOWS[name], info)), "measure": True} for name in names]
        graphs = {}
        for measured in drive(host.url, jobs, timeout=1200):
            name = measured["name"]
            graphs[name] = finished(measured, WORKFLOWS[name], texts[name])
            text = json.dumps(graphs[name], indent=1, ensure_ascii=False)
            (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        jobs = [
            {
                "name": name,
                "graph": graphs[name],
                "geometry": True,
                "refresh": name == "lora_in_ksampler",
                "run": run and name in RUNS_ANYWHERE,
                "timeout": 3600,
            }
            for name in names
        ]
        for result in drive(host.url, jobs, timeout=7200):
            name = result["name"]
            crossed = [text for design in result["geometry"].values() for text in design["found"]]
            print(name, *result["faults"], *result["errors"], *crossed, result.get("run", {}).get("event", ""))
            card = cards(WORKFLOWS)[name]
            if run or not card.panels:
                draw_card(card, host.base_dir / "output", out / f"{name}.jpg")
    finally:
        host.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
