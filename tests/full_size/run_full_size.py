"""Distils models at full size with random weights for two steps, each by its workflow's graph in a real ComfyUI.

    python tests/full_size/run_full_size.py OUT [NAME ...]

Writes OUT/NAME.json for each row of full_graphs.py (all, or those that are named) and the table of all rows in OUT into
docs/full_size.md. One row after the other: SDXL's need up to 22 GB of memory and 6 GB of disk. Needs ComfyUI
(tests/host/server.py says where it is looked for) and Linux.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path[:0] = [str(REPO), str(HERE), str(REPO / "tests" / "host"), str(REPO / "tools")]

from full_graphs import ROWS, Row, files_of, small, with_lora, without_preflight  # noqa: E402
from full_page import update_page  # noqa: E402
from make_workflows import complete  # noqa: E402
from run_files import log_of, lora_of, run_folder  # noqa: E402
from safetensors import safe_open  # noqa: E402
from server import COMFYUI, PYTHON, Host  # noqa: E402
from watch import Watch  # noqa: E402

TIMEOUT = 3600.0
STOPPED = "stopped before the first step:"
NOT_LOADED = "lora key not loaded"


def in_host_python(script: str, *arguments: object) -> None:
    """Run a script of this folder in the host's Python. Raises RuntimeError with the end of what it said."""
    environment = os.environ | {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    command = [PYTHON, HERE / script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script}: {(done.stdout + done.stderr)[-3000:]}")


def error_of(entry: dict) -> tuple[str, str]:
    """(id of the node, message) of a prompt that failed; empty where it did not."""
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            return data["node_id"], data["exception_message"].strip()
    return "", ""


class Session:
    """One row in a server of its own. base: a new folder for the server, with the model files in it."""

    def __init__(self, row: Row, base: Path) -> None:
        self.row, self.name = row, row.workflow["train"]["inputs"]["run_name"]
        self.host = Host(base, flags="--bf16-unet")  # as on a card; on a CPU the host makes float32 of it
        self.found: dict = {"model": row.model, "workflow": row.name}
        models = base / "models"
        wanted = files_of(row)
        in_host_python("write_models.py", models, *(part for pair in wanted for part in pair))
        self.file = models / next(file for network, file in wanted if network == row.network)
        self.found["model GB"] = self.file.stat().st_size / 1e9

    def run(self) -> dict:
        """What was found, for the table; ``refused`` where no run could be had."""
        try:
            self.host.start()
            self.watch = Watch(self.host.process.pid, run_folder(self.host, self.name) / "log.jsonl")
            self.watch.start()
            self.info = self.host.object_info()
            self.train()
        finally:
            self.host.stop()
        if "refused" not in self.found:
            self.compare()
        return self.found

    def queue(self, graph: dict) -> dict:
        return self.host.wait(self.host.queue(complete(graph, self.info)), TIMEOUT)

    def train(self) -> None:
        """The workflow as it is, then without its preflight if that refuses; then the LoRA by core's loader."""
        graph, begun = small(self.row), self.watch.cpu_seconds()
        ended = self.queue(graph)
        node, message = error_of(ended)
        self.found["preflight"] = message or "passed"
        if STOPPED in message:
            self.found["preflight CPU s"] = self.watch.cpu_seconds() - begun
            graph, begun = without_preflight(graph), self.watch.cpu_seconds()
            ended = self.queue(graph)
            node, message = error_of(ended)
        if message:
            self.found |= {"refused": f"{node}: {message}", "peak GB": self.watch.peak / 1e9}
            del self.found["preflight"]
            return
        steps, batch = self.watch.at_step, graph["train"]["inputs"]["batch_size"]
        self.found |= {
            "batch": batch,
            "CPU s": self.watch.cpu_seconds() - begun,
            "step CPU s": steps[2] - steps[1],
            "said": ended["outputs"]["train"]["text"][0],
            "losses": log_of(self.host, self.name),
        }
        saved = self.host.base_dir / "output" / "loras" / f"{self.name}_00001_.safetensors"
        with safe_open(saved, "pt") as file:
            self.found["LoRA keys"] = len(file.keys())
        self.found["LoRA MB"] = saved.stat().st_size / 1e6
        node, message = error_of(self.queue(with_lora(graph, saved.name)))
        assert not message, f"the saved LoRA, node {node}: {message}"
        self.found |= {"keys not loaded": self.host.log().count(NOT_LOADED), "peak GB": self.watch.peak / 1e9}
        self.found["peaks by steps done"] = {steps: peak / 1e9 for steps, peak in self.watch.peaks.items()}

    def compare(self) -> None:
        """The LoRA that core merges beside the one that was trained, in a process of its own."""
        result = self.host.base_dir / "effect.json"
        in_host_python("effect.py", self.row.network, self.file, lora_of(self.host, self.name), result)
        self.found |= json.loads(result.read_text())


def run_row(name: str, out: Path) -> dict:
    """Run a row; its server's log stays as OUT/NAME.log, everything else that it wrote is gone."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        base = Path(folder) / "host"
        try:
            return Session(ROWS[name], base).run()
        finally:
            if (log := base / "server.log").exists():
                shutil.copyfile(log, out / f"{name}.log")


def main(out: Path, names: list[str]) -> None:
    unknown = set(names) - set(ROWS)
    if unknown:
        sys.exit(f"no row {', '.join(unknown)}: there are {', '.join(ROWS)}")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names or ROWS:
        try:
            found = run_row(name, out)
        except Exception:  # the other rows are to be had
            traceback.print_exc()
            failed.append(name)
            continue
        (out / f"{name}.json").write_text(json.dumps(found, indent=1))
        print(name, {key: value for key, value in found.items() if key not in ("losses", "said")}, flush=True)
    update_page({name: json.loads(path.read_text()) for name in ROWS if (path := out / f"{name}.json").exists()})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
