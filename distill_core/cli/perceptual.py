"""``python -m distill_core perceptual train | compare | convert``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..diffusion.noise import ItemNoise
from ..files import check_finite, git_commit, load_tensors, read_json, save_json, save_tensors
from ..methods.losses import squared_error
from ..perceptual.autoencoders import Autoencoder, open_autoencoder
from ..perceptual.calibration import CalibrationConfig, Learner, spearman, train_metric
from ..perceptual.images import open_images
from ..perceptual.lpl import LatentPerceptualLoss
from ..perceptual.metric import ELatentLPIPS
from ..perceptual.pairs import KINDS, SIZE, Pairs, cached_pairs, make_pairs
from ..perceptual.pixel import PIXEL_DISTANCES
from ..perceptual.transforms import PRESETS
from ..perceptual.weights import SPACES, convert_published, load_metric, save_weights
from ..settings import settings_of


def add_perceptual_command(commands) -> None:
    """Add ``perceptual`` and its subcommands to an argparse subparsers object."""
    help = "E-LatentLPIPS: train the metric for an autoencoder, compare latents, convert published weights."
    parts = commands.add_parser("perceptual", help=help, description=help).add_subparsers(
        required=True, metavar="SUBCOMMAND"
    )

    def add(name: str, function, help: str) -> argparse.ArgumentParser:
        sub = parts.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(command=function)
        return sub

    sub = add("train", run_train, "Train trunk and heads for an autoencoder's latents; a stopped run goes on.")
    sub.set_defaults(resumes=True)
    sub.add_argument("--autoencoder", required=True, help='a diffusers vae folder, or "mini"')
    sub.add_argument("--images", type=Path, required=True, help="folder of pictures; subfolders are classes")
    sub.add_argument("--out", type=Path, required=True, help="output folder: metric.safetensors, training.json")
    sub.add_argument("--pixel", choices=PIXEL_DISTANCES, default="efficientnet", help="distance to regress onto")
    sub.add_argument("--size", type=int, default=256, help="pixels a side that pictures are cut to")
    sub.add_argument("--pairs", type=int, default=20000, help="training pairs")
    sub.add_argument("--held-out", type=int, default=1000, help="pairs of other images and draws for the report")
    words = {setting.name: setting.help for setting in settings_of(CalibrationConfig)}
    sub.add_argument("--steps", type=int, default=CalibrationConfig.steps, help=words["steps"])
    sub.add_argument("--batch", type=int, default=CalibrationConfig.batch_size, help=words["batch_size"])
    sub.add_argument("--lr", type=float, default=CalibrationConfig.lr, help=words["lr"])
    sub.add_argument("--widths", type=int, nargs=5, default=CalibrationConfig.widths, help=words["widths"])
    sub.add_argument("--half", action="store_true", help="write the weights in float16")
    sub.add_argument("--seed", type=int, default=0)

    sub = add("compare", run_compare, "Distance of two files of latents, item by item.")
    sub.add_argument("prediction", type=Path, help="safetensors or .latent with `latents` or `latent_tensor`")
    sub.add_argument("target", type=Path)
    sub.add_argument("--weights", type=Path, help="metric file; default is the mini model's")
    sub.add_argument("--preset", choices=PRESETS, default="bg", help="random transforms")
    sub.add_argument("--draws", type=int, default=4, help="how many random draws are averaged")
    sub.add_argument("--raw", action="store_true", help="latents are the autoencoder's own, as in ComfyUI's .latent")
    sub.add_argument("--dump", type=Path, help="also write draws, taps and gradient of the first draw, in float64")
    sub.add_argument("--seed", type=int, default=0)

    sub = add("convert", run_convert, "Published checkpoint (you have the file) -> safetensors, once.")
    sub.add_argument("files", type=Path, nargs="+", help="the .pth file, or trunk and heads")
    sub.add_argument("--model", choices=SPACES, required=True, help="whose latents it is for")
    sub.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    sub.add_argument("--sha256", help="of the first file, checked before it is read")


def run_train(args: argparse.Namespace) -> None:
    started = time.process_time()
    config = CalibrationConfig(tuple(args.widths), args.steps, args.batch, args.lr, seed=args.seed)
    autoencoder, distance = open_autoencoder(args.autoencoder), PIXEL_DISTANCES[args.pixel]()
    train, test = open_images(args.images, args.size, args.seed)
    made_from = {"autoencoder": args.autoencoder, "pixel": args.pixel, "size": args.size, "seed": args.seed}
    _same_as_before(args.out / "pairs.json", made_from)

    def gather(images, count: int, seed: int, name: str, unseen: bool) -> Pairs:
        make = lambda number: make_pairs(images, autoencoder, distance, seed, number, unseen)  # noqa: E731
        with tqdm(total=-(-count // SIZE) * SIZE, desc=f"{name} pairs", mininterval=5) as bar:
            for found in cached_pairs(args.out / name, count, make):
                if isinstance(found, Pairs):
                    return found
                bar.update(found * SIZE - bar.n)
        raise AssertionError  # the last one found is `Pairs`

    pairs = gather(train, args.pairs, 2 * args.seed, "train", unseen=False)
    held_out = gather(test, args.held_out, 2 * args.seed + 1, "held_out", unseen=True)
    with tqdm(total=args.steps, desc="metric", mininterval=5) as bar:
        for state in train_metric(pairs, config, args.out):
            step, losses, learner = state
            bar.update(step - bar.n)
            if step % 20 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
    report = {
        "command": command_line(args),
        "commit": git_commit(),
        **made_from,
        "pairs": len(pairs),
        "widths": list(args.widths),
        "steps": args.steps,
        "final_losses": losses,
        "cpu_seconds_of_this_run": round(time.process_time() - started),
    }
    write_metric(learner, autoencoder, args)
    report["spearman"] = evaluate(load_metric(args.out / "metric.safetensors", draws=4), autoencoder, held_out)
    save_json(args.out / "training.json", report)
    print(json.dumps(report["spearman"], indent=1))


def _same_as_before(file: Path, made_from: dict) -> None:
    if file.is_file() and read_json(file) != made_from:
        raise ValueError(f"{file.parent} holds pairs of another run ; give another --out")
    save_json(file, made_from)


def command_line(args: argparse.Namespace) -> str:
    """The command as it could be typed again, paths by their last part."""
    named = {k.replace("_", "-"): v for k, v in vars(args).items() if k not in ("command", "images", "out")}
    parts = [f"--{k} {' '.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in named.items()]
    parts = ["--half" if p == "--half True" else p for p in parts if p != "--half False"]
    return f"python -m distill_core perceptual train --images {args.images.name} --out {args.out.name} " + " ".join(
        parts
    )


def write_metric(learner: Learner, autoencoder: Autoencoder, args: argparse.Namespace) -> None:
    kind = torch.float16 if args.half else torch.float32
    trunk = {name: value.to(kind) for name, value in learner.trunk.state_dict().items() if "num_batches" not in name}
    heads = [head.detach().to(kind) for head in learner.heads]
    description = {"autoencoder": Path(args.autoencoder).name, "steps": args.steps, "pixel": args.pixel}
    save_weights(args.out / "metric.safetensors", trunk, heads, autoencoder.space, description)


@torch.no_grad()
def evaluate(metric: ELatentLPIPS, autoencoder: Autoencoder, pairs: Pairs, size: int = 50) -> dict:
    """Spearman correlation with the pixel distance over held-out pairs: all, and by kind of distortion."""
    plain = ELatentLPIPS(metric.trunk, [getattr(metric, f"head{i}") for i in range(5)], "none")
    rivals: dict[str, Callable[..., Tensor]] = {
        "LatentLPIPS": plain,
        "E-LatentLPIPS bg, 4 draws": metric,
        "latent MSE": lambda a, b, random: squared_error(a, b),
        "LPL": LatentPerceptualLoss(autoencoder),
    }
    result = {}
    for name, rival in rivals.items():
        parts = []
        for start in tqdm(range(0, len(pairs), size), desc=name, mininterval=5):
            part = slice(start, start + size)
            items = range(start, start + len(pairs.distance[part]))
            parts.append(rival(pairs.distorted[part], pairs.reference[part], ItemNoise(12345, items)).cpu())
        values = torch.cat(parts)
        by_kind = {
            kind: round(spearman(values[pairs.kind == i], pairs.distance[pairs.kind == i]), 4)
            for i, kind in enumerate(KINDS)
            if (pairs.kind == i).sum() > 2
        }
        result[name] = {"all": round(spearman(values, pairs.distance), 4), **by_kind}
    return result


def read_latents(path: Path) -> Tensor:
    """Raises ValueError for a file without latents."""
    tensors, _ = load_tensors(path)
    for name in ("latents", "latent_tensor"):
        if name in tensors:
            check_finite({name: tensors[name]}, path, "encode the pictures again")
            if tensors[name].ndim != 4 or not tensors[name].numel():
                raise ValueError(f"{path}: {name} must be [N, C, H, W], and is {list(tensors[name].shape)}")
            return tensors[name].float()
    raise ValueError(f"{path} has no tensor named latents or latent_tensor; it has {sorted(tensors)}")


def run_compare(args: argparse.Namespace) -> None:
    metric = load_metric(args.weights, preset=args.preset, draws=args.draws)
    prediction, target = read_latents(args.prediction), read_latents(args.target)
    if prediction.shape != target.shape or prediction.shape[1] != metric.channels:
        shapes = f"{list(prediction.shape)} and {list(target.shape)}"
        raise ValueError(f"both files must have equally many latents of {metric.channels} channels, not {shapes}")
    if args.raw:
        prediction, target = metric.from_autoencoder(prediction), metric.from_autoencoder(target)
    random = lambda: ItemNoise(args.seed, range(len(prediction)))  # noqa: E731
    with torch.no_grad():
        terms = metric.terms(prediction, target, random())
    for i, (perceptual, l1) in enumerate(zip(*(terms[k].tolist() for k in ("perceptual", "l1")), strict=True)):
        print(f"{i:5d}  perceptual {perceptual:.6f}  l1 {l1:.6f}")
    if args.dump:
        exact = load_metric(args.weights, torch.float64, preset=args.preset)
        save_tensors(args.dump, exact.dump(prediction.double(), target.double(), random()))
        print(f"draws, transformed latents, taps, distances and gradient: {args.dump}")


def run_convert(args: argparse.Namespace) -> None:
    print(json.dumps(convert_published(args.files, args.model, args.out, args.sha256), indent=1))
