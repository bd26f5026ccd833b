"""``python -m distill_core COMMAND``: demo, compare, cache, train, sample, evaluate, presets, perceptual."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import LatentDataset, cache_latents, check_pairs
from ..diffusion.samplers import SAMPLERS, sample_many
from ..diffusion.schedules import grid_sigmas
from ..evaluation import plots
from ..experiments.compare import add_compare_command
from ..experiments.demo import demo
from ..files import fingerprint, read_lora, save_json, save_lora
from ..methods.registry import Components, new_method
from ..models.denoiser import Denoiser, Guided
from ..models.pipelines import open_source, read_prompts
from ..perceptual import ELatentLPIPS, load_metric
from ..presets.recipe import student_levels
from ..presets.table import add_presets_command
from ..training.config import Config, add_settings_command, describe_keys, load_config
from ..training.loop import Event, Run
from ..training.monitor import Condition, watched
from ..training.preflight import preflight
from .perceptual import add_perceptual_command

CONFIG_HELP = (
    "CONFIG is a TOML file; what is left out takes its default. All sections, keys and defaults:\n\n" + describe_keys()
)


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
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m distill_core", description="Distil diffusion models into 1-4 steps.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, help: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=CONFIG_HELP if config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=function)
        if config:
            sub.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, see below")
        sub.add_argument("--out", type=Path, required=True, help="output folder; a stopped command goes on there")
        return sub

    sub = add(
        "demo", run_demo, "Distil the shipped mini model, evaluate it and draw the result (minutes on 2 cores).", False
    )
    sub.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    add("cache", run_cache, "Sample teacher latents for training; a stopped run goes on where it was.")
    sub = add("train", run_train, "Distil with LADD, ADD or Diffusion2GAN from cached latents; resumable.")
    sub.add_argument("--data", type=Path, required=True, help="folder written by `cache`")
    sub.add_argument("--no-preflight", action="store_true", help="start without the checks for known mistakes")
    sub = add("sample", run_sample, "Draw images from a distilled LoRA, or from the guided teacher without one.")
    sub.add_argument("--lora", type=Path, help="a student.safetensors; without it the teacher is sampled")
    sub.add_argument("--steps", type=int, help="sampling steps (default: the student's trained number; teacher 25)")
    sub.add_argument("--count", type=int, default=10)
    sub.add_argument("--seed", type=int, default=0)
    sub = add(
        "evaluate", run_evaluate, "Compare a LoRA's samples with the cached teacher latents, as Fréchet distance."
    )
    sub.add_argument("--lora", type=Path, required=True)
    sub.add_argument("--data", type=Path, required=True, help="folder written by `cache`, the reference")
    sub.add_argument("--count", type=int, default=1000, help="samples for each number of steps (default 1000)")
    sub.add_argument("--seed", type=int, default=0)
    add_compare_command(commands)
    add_presets_command(commands)
    add_perceptual_command(commands)
    add_settings_command(commands)
    return top


def run_demo(args: argparse.Namespace) -> None:
    demo(args.out, args.seed)


def run_cache(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    source = open_source(config.model)
    prompts = read_prompts(config.prompts.prompts, source)
    conds, uncond = source.encode(prompts, config.prompts.negative)
    teacher = Guided(Denoiser(source.backend), uncond, config.cache.guidance)
    text = "\n".join([*prompts, config.prompts.negative])
    made_from = {"base": fingerprint(source.backend.network), "prompts": hashlib.sha256(text.encode()).hexdigest()}
    with tqdm(total=config.cache.count, desc="cache: teacher latents") as bar:
        for done, _, _ in cache_latents(teacher, conds, source.channels, config.cache, args.out, made_from):
            bar.update(done - bar.n)


def build_run(config: Config, data: Path, out: Path | None, processes=None) -> Run:
    """A `Run` of the chosen method from a config file's sections."""
    source, dataset, settings = open_source(config.model), LatentDataset(data), config.method_config
    backend = source.backend
    if processes:
        backend.network.to(processes.device)
    device = next(backend.network.parameters()).device
    guidance, uncond = dataset.manifest()["guidance"], dataset.uncond().to(device)
    if config.method == "diffusion2gan":
        check_pairs(dataset, Guided(Denoiser(backend), uncond, guidance))
    torch.manual_seed(config.train.seed)
    example = dataset.batch(0, config.train.batch_size, config.train.seed).to(device)
    parts = Components(backend, source.decode_with_gradient, source.encoder)
    distance = perceptual_distance(config.model.perceptual, source.channels, device)
    method = new_method(
        settings,
        parts,
        example,
        config.model.lora_rank,
        uncond,
        guidance,
        config.model.lora_targets,
        config.model.taps,
        config.discriminator,
        config.vision,
        distance,
    )
    description = {config.method: asdict(settings), "model": asdict(config.model), "base": fingerprint(backend.network)}
    return Run(method, dataset, config.train, out, description, processes)


def perceptual_distance(name: str, channels: int, device) -> ELatentLPIPS | None:
    """The metric that ``[model] perceptual`` names. Raises ValueError for one of another latent space."""
    if not name:
        return None
    metric = load_metric(None if name == "mini" else name)
    if metric.channels != channels:
        raise ValueError(f"[model] perceptual: {name} is for latents of {metric.channels} channels, not {channels}")
    return metric.to(device)


def run_train(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    run = build_run(config, args.data, args.out, several_processes())
    if not args.no_preflight:
        preflight(run)
    args.out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=config.train.steps, disable=not run.is_main)
    try:
        with open(args.out / "log.jsonl", "a") as log, bar, stop_after_step() as asked:
            for event, condition in watched(run):
                if run.is_main:
                    show(event, condition, bar, log)
                if asked:
                    break
    finally:
        if run.is_main and run.step:
            save_student(run, config, args.out)
    if asked and run.step < config.train.steps:
        raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])
    logs = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    if run.is_main and logs:
        plots.training_curves({config.method: logs}, args.out / "curves.png")


@contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill the list, and the running step ends first; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def several_processes():
    """accelerate's view of the processes when there are several.

    On GPUs ``accelerate launch -m distill_core train ...``; on CPUs accelerate's launcher starts a single process
    whatever it is asked for, so there it is ``torchrun --nproc_per_node N -m distill_core train ...``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def show(event: Event, condition: Condition, bar: tqdm, log) -> None:
    bar.update(event.step - bar.n)
    names = ("adversarial", "distillation", "pairs", "consistency", "discriminator", "accuracy", "logit_gap")
    figures = {name: f"{event.logs[name]:.3f}" for name in names if name in event.logs}
    bar.set_postfix({**figures, "health": condition.word})
    log.write(json.dumps({"step": event.step, **event.logs, "health": condition.word}) + "\n")
    log.flush()


def save_student(run: Run, config: Config, out: Path) -> None:
    """The averaged student, a LoRA or a whole network, as a file that says how it wants to be sampled."""
    student, backend = run.method.student, run.method.teacher.backend
    with run.ema_weights():
        if student.lora:
            weights, state = "lora", student.lora.export(backend.family.lora_prefix)
        else:
            weights, state = "full", {k: v.clone() for k, v in student.backend.network.state_dict().items()}
    description = {
        "method": config.method,
        "weights": weights,
        "sigmas": list(run.method.levels),
        "sampler": config.model.sampler,
        "cfg": 1.0,
        **backend.description(),
        "steps": run.step,
        "config": {
            config.method: asdict(config.method_config),
            "train": asdict(config.train),
            "model": asdict(config.model),
        },
    }
    save_lora(out / "student.safetensors", state, description)


def load_student(config: Config, lora: Path):
    """(source, student, description) of a student's file. Raises ValueError when it is of another base model."""
    source = open_source(config.model)
    state, description = read_lora(lora)
    base = fingerprint(source.backend.network)
    if description["base"] != base:
        raise ValueError(f"{lora} was distilled from another model (base {description['base']}, this one is {base})")
    if description.get("sampler") not in SAMPLERS:
        raise ValueError(f"{lora} asks for the sampler {description.get('sampler')!r}; known: {list(SAMPLERS)}")
    if description.get("weights") == "full":
        source.backend.network.load_state_dict(state)
        return source, Denoiser(source.backend), description
    prefix = source.backend.family.lora_prefix
    targets = [
        k.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")
    ]
    rank = next(iter(state.values())).shape[0]
    path = source.backend.new_lora(rank, targets)
    path.load_export(state, prefix)
    return source, Denoiser(source.backend, path), description


def run_sample(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    if args.lora:
        source, model, description = load_student(config, args.lora)
        sigmas, sampler = student_levels(description["sigmas"], args.steps), sampler_of(description)
    else:
        source = open_source(config.model)
        sigmas, sampler = grid_sigmas(source.backend.process, args.steps or 25), {"sampler": "euler"}
    prompts = read_prompts(config.prompts.prompts, source)
    conds, uncond = source.encode(prompts, config.prompts.negative)
    model = model if args.lora else Guided(Denoiser(source.backend), uncond, config.cache.guidance)
    shape = (source.channels, *config.cache.sizes[0])
    latents = sample_many(model, sigmas, conds, shape, args.seed, args.count, progress=True, **sampler)
    images = torch.cat([source.decode(part) for part in latents.split(config.cache.batch_size)])
    args.out.mkdir(parents=True, exist_ok=True)
    save_images(images, prompts, args)


def sampler_of(description: dict) -> dict:
    """The arguments of `samplers.sample` that a LoRA's description asks for."""
    return {"sampler": description["sampler"], **description.get("sampler_options", {})}


def save_images(images: Tensor, prompts: list[str], args: argparse.Namespace) -> None:
    from PIL import Image

    for i, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(args.out / f"{i:05d}.png")
    record = [
        {"file": f"{i:05d}.png", "prompt": prompts[i % len(prompts)], "seed": args.seed} for i in range(len(images))
    ]
    save_json(args.out / "samples.json", record)


def run_evaluate(args: argparse.Namespace) -> None:
    from ..evaluation.metrics import ImageFeatures, fd_between

    config = load_config(args.config)
    source, student, description = load_student(config, args.lora)
    dataset = LatentDataset(args.data)
    features = ImageFeatures(source)
    bucket, places = max(dataset.buckets.items(), key=lambda entry: len(entry[1]))  # one size: that of the samples
    shape = bucket[:3]
    places = places[: args.count]
    batches = [places[i : i + 50] for i in range(0, len(places), 50)]
    reference = torch.cat([features(dataset.read(part).latents) for part in tqdm(batches, desc="reference")])
    prompts = read_prompts(config.prompts.prompts, source)
    conds, _ = source.encode(prompts, config.prompts.negative)
    report = {"reference": len(reference), "count": args.count, "seed": args.seed, "fd": {}}
    for steps in range(1, len(description["sigmas"]) + 1):
        sigmas = student_levels(description["sigmas"], steps)
        latents = sample_many(
            student, sigmas, conds, shape, args.seed, args.count, progress=True, **sampler_of(description)
        )
        report["fd"][str(steps)] = fd_between(features(latents), reference)
    save_json(args.out / "evaluation.json", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
