"""``python -m distill_core COMMAND``, also installed as ``turbo-distill``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import TROUBLE, sentence
from ..experiments.compare import add_compare_command
from ..experiments.demo import demo
from ..training.config import add_settings_command, describe_keys
from .cache import run_cache
from .evaluate import run_evaluate
from .perceptual import add_perceptual_command
from .plan import run_plan
from .presets import add_presets_command
from .retention import run_retention
from .sample import run_sample
from .scenes import picture_size, run_scenes
from .train import run_train
from .turbo_files import run_adapter, run_merge

CONFIG_HELP = "CONFIG is a TOML file. What is left out takes its default. All sections, keys and defaults:\n\n"
RESUMES, STARTS_OVER = "output folder; a stopped command goes on there", "output folder"


def main(argv: list[str] | None = None) -> int:
    """Run a command; a mistake of the user's ends with one line on stderr and exit status 2."""
    args = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that files are closed
    try:
        args.command(args)
    except (ValueError, FloatingPointError, *TROUBLE) as error:
        print(f"error: {sentence(error) or error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print(
            "error: not enough memory; `plan CONFIG` says what this run needs, and what to change so that it fits",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        what = "goes on from here" if getattr(args, "resumes", False) else "starts over"
        print(f"stopped; the same command {what}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class Parser(argparse.ArgumentParser):
    """A parser whose paths are not empty: those of a shell's variable that is not set would be the folder one is in."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _path)


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a path, or leave the option out")
    return Path(text)


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def _at_least_2(text: str) -> int:
    if _at_least_1(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: of one picture nothing tells how much they differ")
    return int(text)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < abs(weight) <= 100:
        raise argparse.ArgumentTypeError(f"must be a number from -100 to 100 other than 0, not {text}")
    return weight


def _memory(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = -1
    if not 0 <= size < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of GiB, not {text}")
    return size


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="turbo-distill", description="Distil diffusion models into 1-4 steps.")
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
    sub = add_with_config(
        "cache",
        run_cache,
        "Sample teacher latents or pairs of them for training, or encode own pictures; resumes a stopped command.",
        RESUMES,
    )
    sub.add_argument(
        "--images", type=Path, metavar="FOLDER", help="encode the pictures of this folder; captions in .txt beside them"
    )
    sub.add_argument(
        "--data",
        type=Path,
        help="sample the teacher for the texts and pictures of this dataset's items, not for prompts",
    )
    sub = add_with_config(
        "train", run_train, "Distil from cached latents with any of the methods; resumes a stopped run.", RESUMES
    )
    sub.add_argument("--data", type=Path, help="folder written by `cache`; without it: those of [data] mix")
    sub.add_argument("--no-preflight", action="store_true", help="start without the checks for known mistakes")
    sub = add_with_config(
        "adapter",
        run_adapter,
        "Make a training adapter for a turbo model from its own samples; resumes a stopped command.",
        RESUMES,
    )
    sub.add_argument("--no-preflight", action="store_true", help="start without the checks for known mistakes")
    sub = add_with_config(
        "merge",
        run_merge,
        "Write a student, the [model] loras under it and one that is added to it as one LoRA file.",
        "the file to write",
    )
    sub.add_argument("--lora", type=Path, required=True, help="a student.safetensors that was trained above them")
    sub.add_argument("--add", type=Path, metavar="FILE", help="another LoRA for the model, of preference tuning (dpo)")
    sub.add_argument("--weight", type=_weight, default=1.0, help="its strength (default 1)")
    sub = add_with_config(
        "sample", run_sample, "Draw images from a distilled student, or from the guided teacher.", STARTS_OVER
    )
    sub.add_argument("--lora", type=Path, help="a student.safetensors; without it the teacher is sampled")
    sub.add_argument(
        "--data",
        type=Path,
        help="draw to the texts, masks and pictures of this dataset's items, not to the prompts of CONFIG",
    )
    for name, of in (("text", "text"), ("image", "picture that is edited")):
        sub.add_argument(
            f"--{name}-strength",
            type=float,
            help=f"guidance scale of the {of}, for all items (default: each item's own, else as CONFIG says)",
        )
    sub.add_argument("--steps", type=int, help="sampling steps (default: the student's trained number; teacher 25)")
    sub.add_argument("--count", type=_at_least_1, default=10, help="number of images (default 10)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the images' noise (default 0)")
    sub = add_with_config(
        "evaluate",
        run_evaluate,
        "Score a student beside its teacher, on noises that no training draws and with 95-percent intervals.",
        STARTS_OVER,
    )
    sub.add_argument("--lora", type=Path, required=True, help="a student.safetensors")
    sub.add_argument(
        "--data", type=Path, help="reference latents that it was not trained on; without: the teacher's, other noises"
    )
    sub.add_argument("--prompts", type=Path, help="text file of prompts (default: those of CONFIG)")
    sub.add_argument("--count", type=int, default=1000, help="samples of each model (default 1000)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the samples' noise (default 0)")
    sub = add_with_config(
        "retention",
        run_retention,
        "Say what a turbo model keeps of itself with a LoRA: a score, its parts, and a picture before and after.",
        STARTS_OVER,
    )
    sub.add_argument("--lora", type=Path, required=True, help="a LoRA that was trained on this turbo")
    sub.add_argument("--data", type=Path, help="latents of own pictures that it was not trained on: also the gain")
    sub.add_argument("--prompts", type=Path, help="text file of prompts to keep (default: those of CONFIG)")
    sub.add_argument("--noises", type=_at_least_2, default=8, help="noises of each prompt (default 8)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the noises (default 0)")
    sub = add(
        "scenes",
        run_scenes,
        "Draw pictures of coloured objects with captions, or edits of them with their masks, to train and test on.",
        STARTS_OVER,
    )
    sub.add_argument("--count", type=_at_least_1, default=100, help="number of pictures, or of edits (default 100)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the scenes (default 0)")
    sub.add_argument("--size", type=picture_size, default=(64, 64), help="WIDTHxHEIGHT in pixels (default 64x64)")
    sub.add_argument("--edits", action="store_true", help="each scene twice, one word changed, with the object's masks")
    sub = commands.add_parser(
        "plan",
        help="What a training run will need in memory, and what to change so that it fits; nothing is loaded.",
        description="Counts the memory of a training step without loading the model: seconds, and no GPU.",
        formatter_class=formatter,
    )
    sub.set_defaults(command=run_plan)
    sub.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, as of `train`")
    sub.add_argument("--data", type=Path, help="folder written by `cache`; without: the sizes in CONFIG")
    sub.add_argument("--free", type=_memory, help="free memory in GiB: says what to change so that it fits")
    sub.add_argument(
        "--cards",
        type=_at_least_1,
        nargs="+",
        metavar="N",
        help="so many GPUs, with the batch_size of CONFIG on each: memory, bytes and time of a step on paper",
    )
    sub.add_argument("--cpu", action="store_true", help="on a CPU (without: on a GPU with bfloat16)")
    add_compare_command(commands)
    add_presets_command(commands)
    add_perceptual_command(commands)
    add_settings_command(commands)
    return top
