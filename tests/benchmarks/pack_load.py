"""What loading the pack adds to ComfyUI's start, in CPU seconds: ``python tests/benchmarks/pack_load.py [--runs 5]``.

A full collection of Python's garbage goes through all objects of the host. Whether one falls into the load of this pack
is chance, so its time is told apart.

Needs ComfyUI ($COMFYUI_PATH, $COMFYUI_PYTHON). Each run is a process of its own; the first writes Python's bytecode, as
a user's first start does, and is not counted. A server also starts once, and what it says of the pack is shown.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host"))
from server import COMFYUI, HERE, PYTHON, Host  # noqa: E402

SCRIPT = f"""
import gc, sys, time
sys.path.insert(0, {str(HERE)!r})
from launch import ImportHooks, load_pack
sys.meta_path.insert(0, ImportHooks())
sys.path[0], sys.argv[1:] = {str(COMFYUI)!r}, ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy_api.latest
collected, since = [0.0], [0.0]
def watch(phase, info):
    if phase == "start":
        since[0] = time.process_time()
    else:
        collected[0] += time.process_time() - since[0]
gc.callbacks.append(watch)
start = time.process_time()
load_pack("turbo_pack")
for node in sys.modules["turbo_pack.nodes"].NODES:
    node.GET_SCHEMA()
print("RESULT", time.process_time() - start - collected[0], collected[0], start)
"""
OURS = re.compile(r"turbo.distill|turbo_pack", re.IGNORECASE)
TROUBLE = re.compile(r"warn|error|fail|traceback|deprecat", re.IGNORECASE)


def seconds(cache: str) -> tuple[float, float, float]:
    """CPU seconds of the pack, of collections while it loaded, and of the host before it."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run([PYTHON, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True, cwd=cache)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    pack, collected, host = map(float, line.split()[1:])
    return pack, collected, host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as cache:
        packs, collected, hosts = zip(*[seconds(cache) for _ in range(runs + 1)][1:], strict=True)
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-")))
    try:
        host.start()
        version = host.get("/system_stats")["system"]["comfyui_version"]
        count = sum(name.startswith("TurboDistill") for name in host.object_info())
    finally:
        host.stop()
    trouble = [line for line in host.log().splitlines() if OURS.search(line) and TROUBLE.search(line)]
    print(f"ComfyUI {version}: {count} nodes; lines of trouble that name the pack: {trouble or 'none'}")
    span = f"{min(packs):.3f} to {max(packs):.3f}, {runs} runs"
    print(f"the pack loads in {statistics.median(packs):.3f} s of CPU ({span})", end=", ")
    print(f"beside {statistics.median(collected):.3f} s of garbage collections", end=", ")
    print(f"after the host's {statistics.median(hosts):.1f} s")


if __name__ == "__main__":
    main()
