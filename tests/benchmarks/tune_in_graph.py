"""The workflow tune_mini_turbo in a real ComfyUI: how long it takes, what it keeps, and the pictures.

python tests/benchmarks/tune_in_graph.py --out DIR [--picture FILE.jpg] [--cards FOLDER]

Needs ComfyUI (tests/host/server.py says where it is looked for). The seconds are those of the whole workflow: pictures
to a dataset, the turbo's own samples, the training, report, LoRA, pictures before and after, and Turbo Retention.
``--cards`` draws the card of Templates from the run's pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "host"), str(REPO / "tools")]

from cards import cards, draw_card  # noqa: E402
from make_workflows import complete, numbered  # noqa: E402
from server import Host  # noqa: E402

from distill_core.experiments.demo import machine  # noqa: E402
from distill_core.files import git_commit, save_json  # noqa: E402
from distill_core.lora_files import read_lora  # noqa: E402
from workflows import WORKFLOWS  # noqa: E402

NAME = "tune_mini_turbo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--cards", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    host = Host(Path(tempfile.mkdtemp(prefix="comfyui-", dir=args.out)))
    try:
        host.start()
        report = measure(host)
    finally:
        host.stop()
    output = host.base_dir / "output"
    report["levels"] = read_lora(output / "loras" / f"{NAME}_00001_.safetensors")[1]["sigmas"]
    picture = next(output.glob(f"{NAME}_report_*.png"))
    Image.open(picture).convert("RGB").save(args.picture or args.out / f"{NAME}.jpg", quality=85)
    if args.cards:
        draw_card(cards(WORKFLOWS)[NAME], output, args.cards / f"{NAME}.jpg")
    save_json(args.out / f"{NAME}.json", report | {"commit": git_commit(), "machine": machine()})


def measure(host: Host) -> dict:
    """Seconds of the workflow, and what Turbo Retention says."""
    process, started = psutil.Process(host.process.pid), time.monotonic()
    before, ids = process.cpu_times(), {name: str(i + 1) for i, name in enumerate(WORKFLOWS[NAME])}
    outputs = host.run(numbered(complete(WORKFLOWS[NAME], host.object_info())), 7200)["outputs"]
    after = process.cpu_times()
    report = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": after.user + after.system - before.user - before.system,
        "retention": outputs[ids["retention"]]["text"][0],
    }
    print(f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} s of one processor\n{report['retention']}")
    return report


if __name__ == "__main__":
    main()
