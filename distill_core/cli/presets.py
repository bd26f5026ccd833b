"""``python -m distill_core presets [KEY | check | table]``: the table of turbo models, and the evidence for it."""

from __future__ import annotations

import argparse

from ..presets.explain import explain, table_page
from ..presets.levels import DEFAULT_SIZE, preset_sigmas
from ..presets.reference import HOST, disagreement, unsupported
from ..presets.table import find_preset, presets, spell

AGREES = 1e-3  # flow time


def add_presets_command(subparsers) -> argparse.ArgumentParser:
    """Add ``presets [KEY]`` to the subparsers of ``python -m distill_core``."""
    text = "List the turbo models whose noise levels are known, print one, or check them."
    parser = subparsers.add_parser("presets", help=text, description=text)
    about = "print this one; check: run each through its reference scheduler and list those that one source supports; "
    parser.add_argument("key", nargs="?", help=about + "table: the page of all, docs/presets.md; without it, list all")
    parser.add_argument("--steps", type=int, help="default: the preset's own")
    parser.add_argument("--width", type=int, default=DEFAULT_SIZE, help="of the picture in pixels (default 1024)")
    parser.add_argument("--height", type=int, default=DEFAULT_SIZE)
    parser.set_defaults(command=print_presets)
    return parser


def print_presets(args: argparse.Namespace) -> None:
    """Raises ValueError for an unknown key, a step count that the model was not made for, and a failed check."""
    if args.key == "table":
        print(table_page(), end="")
    elif args.key == "check":
        check_presets()
    elif args.key is None:
        for preset in presets().values():
            columns = f"{preset.key:28} {spell(preset.steps):>8} steps  {preset.sampler or 'own':9}"
            print(f"{columns} {preset.confidence}  {preset.title}")
    else:
        preset = find_preset(args.key)
        steps = preset.default_steps if args.steps is None else args.steps
        print(explain(preset, steps, preset_sigmas(preset, steps, None, args.width, args.height)))


def check_presets() -> None:
    """Print the rows that lack evidence, then how far each is from its reference scheduler.

    Raises ValueError when one is further than 1e-3 in flow time.
    """
    import diffusers  # slow, and needed here only

    diffusers.utils.logging.set_verbosity_error()  # its LCM and TCD warn of lists that makers did train
    rows = list(presets().values())
    lacking = {row.key: unsupported(row) for row in rows}
    for key, lacks in lacking.items():
        if lacks:
            print(f"{key:28} {', '.join(lacks)}")
    run = [row for row in rows if row.reference and row.reference["scheduler"] != HOST]
    differ = {row.key: max(disagreement(row, steps) for steps in row.steps) for row in run}
    print(f"{len(rows)} presets, {sum(bool(lacks) for lacks in lacking.values())} listed above")
    in_host = sum(row.known for row in rows) - len(run)
    print(
        f"{len(run)} run through their reference scheduler: at most {max(differ.values()):.2g} apart in flow time; "
        f"{in_host} whose reference is {HOST} are run by tests/host"
    )
    wrong = {key: far for key, far in differ.items() if far > AGREES}
    if wrong:
        raise ValueError("not what the reference gives: " + ", ".join(f"{k} ({far:.2g})" for k, far in wrong.items()))
