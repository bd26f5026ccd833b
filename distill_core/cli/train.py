"""The commands that train: ``cache`` and ``train``."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from ..data.cache import cache_latents
from ..data.dataset import LatentDataset
from ..evaluation import live_plots
from ..files import fingerprint
from ..methods.components import Components
from ..models.denoiser import Denoiser, Guided
from ..models.pipelines import open_source, read_prompts
from ..perceptual import ELatentLPIPS, load_metric
from ..training.config import Config, load_config
from ..training.loop import Event
from ..training.monitor import Condition
from ..training.preflight import preflight
from ..training.run import RunConfig, RunFolder, StudentConfig, new_run, train_to_end

SHOWN = ("discriminator", "accuracy", "logit_gap")  # beside the terms of the student's loss


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


def run_train(args: argparse.Namespace) -> None:
    config, accelerator = load_config(args.config), several_processes()
    source = open_source(config.model)
    if accelerator:
        source.backend.network.to(accelerator.device)
    folder, student_file, dataset = RunFolder(args.out), args.out / "student.safetensors", LatentDataset(args.data)
    components = Components(source.backend, source.decode_with_gradient, source.encoder)
    distance = perceptual_distance(config.model.perceptual, source.channels, components.device)
    run_config = describe(config, components, dataset, distance)
    if folder.finished(run_config.request()) and student_file.exists():
        print(f"this run has ended: its student is {student_file}")
        return
    run = new_run(run_config, components, dataset, folder.path, distance=distance, accelerator=accelerator)
    if not args.no_preflight:
        preflight(run)
    with tqdm(total=config.train.steps, disable=not run.is_main) as bar, stop_after_step() as stop:
        train_to_end(run, run_config, folder, student_file, [Progress(bar, run_config.method.terms), stop])
    if run.is_main:
        title = config.method_config.title_with_terms()
        live_plots.curves(folder.logs(), title=title).save(args.out / "curves.png")


def describe(
    config: Config, components: Components, dataset: LatentDataset, distance: ELatentLPIPS | None
) -> RunConfig:
    """What decides the run, known before anything is made for it."""
    model = config.model
    identities: dict[str, Any] = {
        "base": fingerprint(components.backend.network),
        "dataset": dataset.digest(),
        "dtype": model.dtype,
    }
    if distance is not None:
        identities["perceptual"] = distance.identity()
    student = StudentConfig(model.lora_rank, model.lora_targets, model.sampler)
    return RunConfig(
        config.method_config, config.train, student, identities, config.discriminator, config.vision, model.taps
    )


def perceptual_distance(name: str, channels: int, device: torch.device | str) -> ELatentLPIPS | None:
    """The metric that ``[model] perceptual`` names. Raises ValueError for one of another latent space."""
    if not name:
        return None
    metric = load_metric(None if name == "mini" else name)
    if metric.channels != channels:
        raise ValueError(f"[model] perceptual: {name} is for latents of {metric.channels} channels, not {channels}")
    return metric.to(device)


class Progress:
    """The progress bar with the step's figures and the discriminator's condition."""

    def __init__(self, bar: tqdm, terms: Iterable[str]) -> None:
        self.bar, self.shown = bar, (*terms, *SHOWN)

    def __call__(self, event: Event, condition: Condition) -> None:
        self.bar.update(event.step - self.bar.n)
        figures = {name: f"{event.logs[name]:.3f}" for name in self.shown if name in event.logs}
        self.bar.set_postfix({**figures, "health": condition.word})


class Stop:
    """Ends the run after the step in which it was asked to."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.signal is not None and event.step < event.steps:
            raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


@contextmanager
def stop_after_step() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM let the running step end first; a second one stops at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        stop.signal = number
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def several_processes() -> Any:
    """accelerate's view of the processes when there are several.

    On GPUs ``accelerate launch -m distill_core train ...``; on CPUs accelerate's launcher starts a single process
    whatever it is asked for, so there it is ``torchrun --nproc_per_node N -m distill_core train ...``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())
