"""Damaged files of every kind that is read, by the commands and, with --host, by the nodes.

    python tests/attack/files.py --count 300 --seed 0 --out DIR [--host 100]

A case damages one file of a finished little run (cut, foreign, wrong JSON, wrong shapes, NaN, a folder, a link in a
circle, ...) and starts a command that reads it. Each must end well, or with one sentence on stderr and exit status 2;
values that are not finite must not be taken, and no file of the others may change. Exit status 1 where one does not.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from damage import damage  # noqa: E402
from outcomes import Outcomes  # noqa: E402

from distill_core.cli.main import main as command  # noqa: E402
from distill_core.files import load_tensors, save_tensors  # noqa: E402
from distill_core.perceptual.weights import SHIPPED  # noqa: E402

CONFIG = """
[model]
lora_rank = 2
perceptual = "metric.safetensors"
[prompts]
prompts = "prompts.txt"
[cache]
count = 6
steps = 2
guidance = 1.5
sizes = [[8, 8]]
state_sigmas = [1.0, 0.5]
shard_size = 3
batch_size = 3
[train]
steps = 2
batch_size = 2
student_lr = 3e-4
warmup_steps = 1
[ladd]
terms = { adversarial = 1.0, pairs = 1.0 }
warmup_steps = 0
[discriminator]
width = 16
"""
CASE_SECONDS = 200
# Kind -> (file in the case's folder, command that reads it).
CASES: dict[str, tuple[str, str]] = {
    "student's LoRA": (
        "run/student.safetensors",
        "sample c.toml --lora run/student.safetensors --count 1 --out images",
    ),
    "checkpoint": ("run/checkpoint.safetensors", "train longer.toml --data data --out run --no-preflight"),
    "shard, train": ("data/shard-00000.safetensors", "train c.toml --data data --out new --no-preflight"),
    "shard, cache": ("data/shard-00001.safetensors", "cache c.toml --out data"),
    "uncond": ("data/uncond.safetensors", "train c.toml --data data --out new --no-preflight"),
    "dataset.json, train": ("data/dataset.json", "train c.toml --data data --out new --no-preflight"),
    "dataset.json, cache": ("data/dataset.json", "cache c.toml --out data"),
    "report.json": ("run/report.json", "train c.toml --data data --out run --no-preflight"),
    "log.jsonl": ("run/log.jsonl", "train longer.toml --data data --out run --no-preflight"),
    "settings, cache": ("c.toml", "cache c.toml --out other"),
    "settings, train": ("c.toml", "train c.toml --data data --out new --no-preflight"),
    "prompts": ("prompts.txt", "cache c.toml --out other"),
    "perceptual weights": (
        "metric.safetensors",
        "perceptual compare a.safetensors b.safetensors --weights metric.safetensors",
    ),
    "latents": ("a.safetensors", "perceptual compare a.safetensors b.safetensors --weights metric.safetensors"),
}


def make_base(folder: Path) -> Path:
    """A run of two steps with everything that is read, by the commands themselves."""
    (folder / "c.toml").write_text(CONFIG)
    (folder / "longer.toml").write_text(CONFIG.replace("steps = 2\nbatch", "steps = 3\nbatch"))
    (folder / "prompts.txt").write_text("bag\ncoat\n")
    shutil.copyfile(SHIPPED / "mini.safetensors", folder / "metric.safetensors")
    random_latents = torch.Generator().manual_seed(0)
    for name in "ab":
        save_tensors(folder / f"{name}.safetensors", {"latents": torch.randn(2, 16, 8, 8, generator=random_latents)})
    for line in ("cache c.toml --out data", "train c.toml --data data --out run --no-preflight"):
        code, said = run(folder, line)
        assert code == 0, said
    return folder


def run(folder: Path, line: str) -> tuple[int | str, str]:
    """Exit status of a command in a folder (or "raw NAME" of what it raised), and what it said on stderr."""
    said = io.StringIO()

    def too_long(*_) -> None:
        raise TimeoutError(f"no end in {CASE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(CASE_SECONDS)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()), _inside(folder):
            return command(line.split()), said.getvalue()
    except SystemExit as end:
        return end.code or 0, said.getvalue()
    except BaseException as error:
        return f"raw {type(error).__name__}", said.getvalue() + traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _inside:
    """The working folder, for the relative paths of a command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, Path.cwd()

    def __enter__(self) -> None:
        import os

        os.chdir(self.folder)

    def __exit__(self, *error) -> None:
        import os

        os.chdir(self.before)


def judge(code: int | str, said: str, path: Path) -> str:
    """What became of a case; path: the damaged file, which a command may have made again."""
    if isinstance(code, str):
        return code
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and len(errors) == 1 and "Traceback" not in said:
        return "our sentence"
    if code == 0:
        return "success" if _finite(path) else "taken, not finite"
    return f"status {code}"


def _finite(path: Path) -> bool:
    """Whether a file holds no value that is not finite, as far as it holds tensors."""
    try:
        tensors, _ = load_tensors(path) if path.suffix == ".safetensors" else ({}, {})
    except ValueError:
        return True
    return all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


def attack(folder: Path, count: int, seed: int, report: Callable[[Outcomes], None] = lambda _: None) -> Outcomes:
    """``count`` cases, the kinds in turn."""
    outcomes, draw = Outcomes("damaged file"), random.Random(seed)
    base = make_base(_new(folder / "base"))
    kinds = list(CASES)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name, line = CASES[kind]
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(base, case)
        way = damage(draw, case / name)
        others = _contents(case, name)
        code, said = run(case, line)
        result = judge(code, said, case / name)
        now = _contents(case, name)
        written = ("run/", "new/", "other/", "images/", "data/")
        changed = [p for p in others if others[p] != now.get(p) and not p.startswith(written)]
        outcomes.add(kind, "other file changed" if changed else result, [way, line, changed], said)
        if number % 20 == 19:
            report(outcomes)
    return outcomes


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _contents(folder: Path, damaged: str) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if not p.is_symlink() and p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if str(p.relative_to(folder)) != damaged}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for outcomes.json and table.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()

    def report(outcomes: Outcomes) -> None:
        print(f"{outcomes.bad} bad, {time.monotonic() - started:.0f} s", flush=True)
        outcomes.save(args.out, seed=args.seed, count=args.count)

    with tempfile.TemporaryDirectory() as folder:
        outcomes = attack(Path(folder), args.count, args.seed, report)
    outcomes.save(args.out, seed=args.seed, count=args.count)
    print(outcomes.markdown())
    return 1 if outcomes.bad else 0


if __name__ == "__main__":
    sys.exit(main())
