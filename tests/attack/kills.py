"""SIGKILL at random moments: headless ``cache`` and ``train`` and, with --host, Teacher Latents and LADD Trainer.

    python tests/attack/kills.py --count 20 --host 10 --seed 0 --out DIR

Half of the headless kills hit ``cache``, half ``train``; the command is started again until it ends. At the end the
dataset, the checkpoint and the student must be bit-equal to those of an uninterrupted run, every step must be in the
log once, and no other file may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path += [str(HERE), str(HERE.parent / "host"), str(REPO)]

from outcomes import Outcomes  # noqa: E402

CONFIG = """
[model]
lora_rank = 2
[cache]
count = 24
steps = 2
guidance = 1.5
sizes = [[8, 8]]
state_sigmas = [1.0, 0.5]
shard_size = 6
batch_size = 2
[train]
steps = 30
batch_size = 2
student_lr = 3e-4
warmup_steps = 1
checkpoint_every = 2
[ladd]
terms = { adversarial = 1.0, pairs = 1.0 }
warmup_steps = 0
[discriminator]
width = 16
"""
LOCKS = {".lock"}  # an empty file that stays


def start(folder: Path, line: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distill_core", *line.split()]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def files_in(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of what a command leaves: pictures by name only, a page without the name of its folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in LOCKS:
            content = b"" if path.suffix == ".png" else path.read_bytes()
            if path.suffix == ".html":
                for tag in ("title", "h1"):
                    content = content.replace(f"<{tag}>{folder.name}</{tag}>".encode(), b"")
            found[str(path.relative_to(folder))] = content
    return found


def faults(folder: Path, whole: dict[str, bytes]) -> list[str]:
    """What differs from an uninterrupted run."""
    mine = files_in(folder)
    left = [f"left over: {name}" for name in mine.keys() - whole.keys()]
    gone = [f"missing: {name}" for name in whole.keys() - mine.keys()]
    differ = [f"differs: {name}" for name in mine.keys() & whole.keys() if mine[name] != whole[name]]
    log = folder / "log.jsonl"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []
    twice = [f"steps in the log: {steps}"] if steps != sorted(set(steps)) else []
    return left + gone + differ + twice


def progress(folder: Path, kind: str) -> int:
    """How far a command is: latents stored, or steps logged."""
    if kind == "cache":
        return len(list(folder.glob("*-*.safetensors")))
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def killed_until_done(root: Path, kind: str, line: str, folder: Path, kills: int, draw: random.Random) -> int:
    """Run the command, kill it ``kills`` times at random moments after it began to work; returns how many hit it."""
    hit = 0
    for _ in range(kills):
        process, before = start(root, line), progress(folder, kind)
        while process.poll() is None and progress(folder, kind) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit += 1
        process.communicate()
    process = start(root, line)
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said[-3000:]
    return hit


def headless(root: Path, kills: int, draw: random.Random, outcomes: Outcomes) -> None:
    """Rounds of one to three kills each for ``cache`` and for ``train``."""
    (root / "c.toml").write_text(CONFIG)
    lines = {"cache": "cache c.toml --out {}", "train": "train c.toml --data cache --out {} --no-preflight"}
    for kind, line in lines.items():
        process = start(root, line.format(kind))
        said = process.communicate()[1].decode()
        assert process.returncode == 0, said[-3000:]
        whole, left, number = files_in(root / kind), kills // 2, 0
        while left > 0:
            number += 1
            folder = root / f"{kind}{number}"
            hits = killed_until_done(root, kind, line.format(folder.name), folder, min(left, draw.randint(1, 3)), draw)
            left -= max(1, hits)
            found = faults(folder, whole)
            for _ in range(max(1, hits)):
                outcomes.add(f"{kind}, headless", found[0].split(":")[0] if found else "success", found)


def in_host(root: Path, kills: int, draw: random.Random, outcomes: Outcomes) -> None:
    """The server is killed in Teacher Latents and in LADD Trainer, started again and the same graph queued."""
    from graphs import mini_dataset, mini_training, node
    from run_files import lora_of, run_folder, steps_of
    from server import Host

    host = Host(root / "comfyui")
    output = host.base_dir / "output" / "turbo_distill"
    teacher = dict(count=24, steps=3, batch_size=2)

    def latents(name: str) -> dict:
        return mini_dataset(name, **teacher) | {"out": node("PreviewAny", source=["dataset", 0])}

    def training(name: str) -> dict:
        settings = dict(steps=20, batch_size=2, checkpoint_every=2, dataset="whole")
        return mini_training(name, teacher=teacher, **settings)

    graphs = {"Teacher Latents": latents, "LADD Trainer": training}
    try:
        host.start()
        for kind, graph in graphs.items():
            host.run(graph("whole"), 600)
            place = (
                (lambda name: output / "datasets" / name)
                if kind == "Teacher Latents"
                else (lambda n: run_folder(host, n))
            )
            whole = files_in(place("whole"))
            for number in range(kills // 2):
                name = f"killed{number}"
                host.queue(graph(name))
                while not progress(place(name), "cache" if kind == "Teacher Latents" else "train"):
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.5))
                host.process.kill()
                host.process.wait()
                host.start()
                host.run(graph(name), 600)
                told = ("report.json", "started.json", "run.html")  # they show the run's name
                found = [f for f in faults(place(name), whole) if not f.endswith(told)]
                if kind == "LADD Trainer":
                    same = lora_of(host, name).read_bytes() == lora_of(host, "whole").read_bytes()
                    found += [] if same else ["differs: the LoRA"]
                    found += [] if steps_of(host, name) == list(range(1, 21)) else ["steps: in the log"]
                outcomes.add(f"{kind}, host", found[0].split(":")[0] if found else "success", found)
    finally:
        host.stop()


def attack(root: Path, kills: int, host_kills: int, seed: int) -> Outcomes:
    outcomes, draw = Outcomes("kill"), random.Random(seed)
    headless(root, kills, draw, outcomes)
    if host_kills:
        in_host(root, host_kills, draw, outcomes)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills of the commands")
    parser.add_argument("--host", type=int, default=10, help="kills of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for outcomes.json and table.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = attack(Path(folder), args.count, args.host, args.seed)
    outcomes.save(args.out, seed=args.seed, count=args.count)
    print(outcomes.markdown())
    for failure in outcomes.failures:
        print(failure["kind"], failure["case"])
    return 1 if outcomes.bad else 0


if __name__ == "__main__":
    sys.exit(main())
