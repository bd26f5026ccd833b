"""Damaged files of every kind that the nodes read, in a real ComfyUI server on the CPU.

    python tests/attack/node_files.py --count 100 --seed 0 --out DIR

A case damages one file of a dataset or of a run that was stopped, and queues the graph that reads it. It must end as a
success or with a sentence of ours, and the server must go on serving. Exit status 1 where one does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "host"), str(HERE.parents[1])]

from damage import damage  # noqa: E402
from graphs import mini_dataset, mini_training, node  # noqa: E402
from outcomes import Outcomes  # noqa: E402
from server import Host  # noqa: E402
from settings import outcome_of  # noqa: E402

from distill_core.perceptual.weights import SHIPPED  # noqa: E402

TEACHER = dict(count=8, steps=2, batch_size=4)
RUN, DATA = "turbo_distill/runs/attack", "turbo_distill/datasets/attack"
# Kind -> (file in the output folder, what is queued).
CASES = {
    "checkpoint": (f"{RUN}/checkpoint.safetensors", "train longer"),
    "log": (f"{RUN}/log.jsonl", "train longer"),
    "log, report": (f"{RUN}/log.jsonl", "report"),
    "report.json": (f"{RUN}/report.json", "train"),
    "started.json": (f"{RUN}/started.json", "report"),
    "the run's LoRA": ("loras/turbo_distill/attack.safetensors", "train"),
    "shard": (f"{DATA}/shard-00000.safetensors", "train anew"),
    "uncond": (f"{DATA}/uncond.safetensors", "train anew"),
    "dataset.json": (f"{DATA}/dataset.json", "train anew"),
    "perceptual weights": ("../models/perceptual/attack.safetensors", "compare"),
}


def workflow(what: str) -> dict:
    if what == "report":
        return {"report": node("TurboDistillReport", run_name="attack")}
    if what == "compare":
        return {
            "metric": node(
                "TurboDistillLoadPerceptual", weights="attack.safetensors", transforms="bg", draws=1, l1=0.0
            ),
            "out": node("PreviewAny", source=["metric", 0]),
        }
    steps, name = {"train": (2, "attack"), "train longer": (3, "attack"), "train anew": (1, "anew")}[what]
    return mini_training(name, "attack", TEACHER, steps=steps, batch_size=2)


def attack(host: Host, count: int, seed: int) -> Outcomes:
    outcomes, draw = Outcomes("damaged file"), random.Random(seed)
    output, kept = host.base_dir / "output", host.base_dir / "kept"
    weights = host.base_dir / "models" / "perceptual" / "attack.safetensors"
    weights.parent.mkdir(exist_ok=True)
    shutil.copyfile(SHIPPED / "mini.safetensors", weights)
    host.run(workflow("train"), 300)
    shutil.copytree(output, kept)
    kinds = list(CASES)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name, what = CASES[kind]
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        _remove(weights)
        shutil.copyfile(SHIPPED / "mini.safetensors", weights)
        host.forget()  # the host's cache would hide the file
        way = damage(draw, output / name)
        result, said = outcome_of(host, workflow(what))
        taken = result == "success" and way in ("NaN", "infinite") and kind in ("checkpoint", "the run's LoRA")
        outcomes.add(kind, "taken, not finite" if taken else result, [way, what], said)
    _remove(weights)
    assert (
        outcome_of(host, mini_dataset("after", **TEACHER) | {"out": node("PreviewAny", source=["dataset", 0])})[0]
        == "success"
    )
    return outcomes


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for outcomes.json and table.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        host = Host(Path(folder) / "comfyui")
        try:
            host.start()
            outcomes = attack(host, args.count, args.seed)
        finally:
            host.stop()
    outcomes.save(args.out, seed=args.seed, count=args.count)
    print(outcomes.markdown())
    return 1 if outcomes.bad else 0


if __name__ == "__main__":
    sys.exit(main())
