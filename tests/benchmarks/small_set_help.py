"""What helps with few pictures: ``python tests/benchmarks/small_set_help.py --out DIR``.

LADD on 10, 30 and 100 pictures as in own_pictures.py, with one thing changed at a time. The seeds, the pictures and the
held-out pictures are none of those that own_pictures.py reports. A line of ``results.jsonl`` a run; what is there is
not done again. At the end: table.md (docs/own_pictures.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import own_pictures as own  # which makes distill_core known
import torch

from distill_core.data.fashion_mnist import DEBIAN_DATA
from distill_core.methods.ladd import LADD

CASES = [
    own.Case(style, count, "LADD", seed)
    for count in own.COUNTS
    for style, seed in (("inverted, turned", 8), ("turned", 9))
]
HELD_OUT = 40  # the first test picture of each class: those before it are own_pictures.py's


@dataclass(frozen=True)
class Change:
    """What differs from own_pictures.py: LADD's settings, the loop's, and every how many steps the heads learn."""

    method: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    every: int = 1


CHANGES = {
    "nothing": Change(),
    "heads learn in every second step": Change(every=2),
    "r1 = 0.1": Change(dict(r1=0.1)),
    "discriminator_updates = 2": Change(train=dict(discriminator_updates=2)),
}


@contextmanager
def changed(change: Change) -> Iterator[None]:
    """own_pictures.py with a change; a loss of 0 gives Adam without momentum nothing to do."""
    methods, train, loss = own.METHODS, own.TRAIN, LADD.discriminator_loss

    def rare_loss(self, step):
        value, logs = loss(self, step)
        return (value if step.number % change.every == 0 else 0 * value), logs

    own.METHODS = {"LADD": replace(methods["LADD"], **change.method)}
    own.TRAIN = replace(train, **change.train)
    LADD.discriminator_loss = rare_loss
    try:
        yield
    finally:
        own.METHODS, own.TRAIN, LADD.discriminator_loss = methods, train, loss


def separation(folder: Path) -> float:
    """Of the last 100 steps (`training.monitor`)."""
    logs = [entry for entry in own.RunFolder(folder).logs()[-100:] if "logit_spread" in entry]
    spread = math.sqrt(sum(entry["logit_spread"] ** 2 for entry in logs) / len(logs))
    return sum(entry["logit_gap"] for entry in logs) / len(logs) / spread


def table(found: dict[str, dict]) -> str:
    """A row a change: how much of the distance is left in each case, and that beside nothing (geometric mean)."""
    heads = [f"{case.style} {case.count}" for case in CASES]
    lines = [f"| changed | {' | '.join(heads)} | beside nothing | separation |", "|---|" + "---|" * (len(heads) + 2)]
    for name in CHANGES:
        runs, plain = ([found.get(f"{n}: {case.name}") for case in CASES] for n in (name, "nothing"))
        if None in runs or None in plain:
            continue
        ratio = math.exp(sum(math.log(a["after"] / b["after"]) for a, b in zip(runs, plain, strict=True)) / len(runs))
        parts = " | ".join(f"{run['after'] / run['before']:.0%}" for run in runs)
        apart = [run["separation"] for run in runs]
        lines.append(f"| {name} | {parts} | {ratio:.2f} | {min(apart):.2f} to {max(apart):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, results.jsonl and table.md")
    parser.add_argument("--pictures", type=Path, default=Path(DEBIAN_DATA), help="folder with the idx.gz files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    ruler = own.Ruler(own.Pictures(args.pictures, HELD_OUT))
    for number, (name, change) in enumerate(CHANGES.items()):
        for case in CASES:
            run = f"{name}: {case.name}"
            if run in own.results(args.out):
                continue
            with changed(change):
                entry = own.observe(case, ruler, args.out / str(number))
            entry |= {"run": run, "separation": separation(args.out / str(number) / case.name)}
            own.note(entry, args.out)
    text = table(own.results(args.out))
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
