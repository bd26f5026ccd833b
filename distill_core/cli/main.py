"""``python -m distill_core COMMAND``, also installed as ``turbo-distill``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ..experiments.compare import add_compare_command
from ..experiments.demo import demo
from ..training.config import add_settings_command, describe_keys
from .perceptual import add_perceptual_command
from .presets import add_presets_command
from .sample import run_evaluate, run_sample
from .train import run_cache, run_train

CONFIG_HELP = "CONFIG is a TOML file. What is left out takes its default. All sections, keys and defaults:\n\n"
RESUMES, STARTS_OVER = "output folder; a stopped command goes on there", "output folder"


def main(argv: list[str] | None = None) -> int:
    """Run a command; a mistake of the user's ends with one line on stderr and exit status 2."""
    args = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that files are closed
    try:
        args.command(args)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        what = "goes on from here" if getattr(args, "resumes", False) else "starts over"
        print(f"stopped; the same command {what}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="turbo-distill", description="Distil diffusion models into 1-4 steps.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.RawDescriptionHelpFormatter

    def add(name: str, run: Callable, help: str, out: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=formatter)
        sub.set_defaults(command=run, resumes=out is RESUMES)
        sub.add_argument("--out", type=Path, required=True, help=out)
        return sub

    def add_with_config(name: str, run: Callable, help: str, out: str) -> argparse.ArgumentParser:
        sub = add(name, run, help, out)
        sub.epilog = CONFIG_HELP + describe_keys()
        sub.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, see below")
        return sub

    sub = add(
        "demo",
        lambda args: demo(args.out, args.seed),
        "Distil the shipped mini model, evaluate it and draw the result (minutes on 2 cores).",
        "output folder; the cached dataset is used again, training starts over",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of all randomness (default 0)")
    add_with_config("cache", run_cache, "Sample teacher latents for training; resumes a stopped command.", RESUMES)
    sub = add_with_config(
        "train", run_train, "Distil from cached latents with any of the methods; resumes a stopped run.", RESUMES
    )
    sub.add_argument("--data", type=Path, required=True, help="folder written by `cache`")
    sub.add_argument("--no-preflight", action="store_true", help="start without the checks for known mistakes")
    sub = add_with_config(
        "sample", run_sample, "Draw images from a distilled student, or from the guided teacher.", STARTS_OVER
    )
    sub.add_argument("--lora", type=Path, help="a student.safetensors; without it the teacher is sampled")
    sub.add_argument("--steps", type=int, help="sampling steps (default: the student's trained number; teacher 25)")
    sub.add_argument("--count", type=int, default=10, help="number of images (default 10)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the images' noise (default 0)")
    sub = add_with_config(
        "evaluate",
        run_evaluate,
        "Compare a student's samples with the cached teacher latents, as Fréchet distance.",
        STARTS_OVER,
    )
    sub.add_argument("--lora", type=Path, required=True, help="a student.safetensors")
    sub.add_argument("--data", type=Path, required=True, help="folder written by `cache`, the reference")
    sub.add_argument("--count", type=int, default=1000, help="samples for each number of steps (default 1000)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the samples' noise (default 0)")
    add_compare_command(commands)
    add_presets_command(commands)
    add_perceptual_command(commands)
    add_settings_command(commands)
    return top
