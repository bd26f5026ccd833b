"""``python -m distill_core presets [KEY]``: the table of turbo models."""

from __future__ import annotations

import argparse

from ..presets.table import DEFAULT_SIZE, explain, find_preset, preset_sigmas, presets, spell


def add_presets_command(subparsers) -> argparse.ArgumentParser:
    """Add ``presets [KEY]`` to the subparsers of ``python -m distill_core``."""
    text = "List the turbo models whose noise levels are known, or print one."
    parser = subparsers.add_parser("presets", help=text, description=text)
    parser.add_argument("key", nargs="?", help="print this one; without it, list all")
    parser.add_argument("--steps", type=int, help="default: the preset's own")
    parser.add_argument("--width", type=int, default=DEFAULT_SIZE, help="of the picture in pixels (default 1024)")
    parser.add_argument("--height", type=int, default=DEFAULT_SIZE)
    parser.set_defaults(command=print_presets)
    return parser


def print_presets(args: argparse.Namespace) -> None:
    """Raises ValueError for an unknown key or a step count that the model was not made for."""
    if args.key is None:
        for preset in presets().values():
            columns = f"{preset.key:28} {spell(preset.steps):>8} steps  {preset.sampler or 'own':9}"
            print(f"{columns} {preset.confidence}  {preset.title}")
        return
    preset = find_preset(args.key)
    steps = preset.default_steps if args.steps is None else args.steps
    print(explain(preset, steps, preset_sigmas(preset, steps, None, args.width, args.height)))
