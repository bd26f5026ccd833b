"""The command ``train``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import LatentDataset
from ..data.mix import new_mix, open_data
from ..evaluation import live_plots
from ..evaluation.retention_watch import retention_listeners
from ..evaluation.run_page import RunPage, note
from ..evaluation.student_pictures import StudentPictures, first_items
from ..methods.components import Components
from ..methods.config import MethodConfig
from ..models.backends.diffusers import DiffusersBackend
from ..models.offload import NONE
from ..models.pipelines import MiniSource, PipelineSource, open_source
from ..models.precision import halves_to_bfloat16
from ..models.sharding import Sharding
from ..models.strengths import StrengthsConfig
from ..models.teachers import Teacher, open_teacher
from ..perceptual import ELatentLPIPS, load_metric
from ..presets.recipe import Recipe
from ..settings import settings_of
from ..training.changes import OtherSettings
from ..training.config import SECTIONS, Config, load_config
from ..training.loop import Event, Run
from ..training.monitor import Condition
from ..training.other_teacher import own_teacher_only, teacher_notes
from ..training.preflight import preflight
from ..training.progress import SHOWN, StatusLine
from ..training.run import RunConfig, Watcher, longer, new_run, pairs_notes, train_to_end
from ..training.run_folder import RunFolder
from ..training.sharded import check_sharded
from .plan import check_memory
from .turbo import find_turbo, teachers_recipe, tuned, with_kept


def run_train(args: argparse.Namespace) -> None:
    config = training_config(args)
    accelerator = several_processes()
    if config.train.shard:
        check_sharded(config.train, config.model.lora_rank > 0, accelerator.num_processes if accelerator else 1)
        if config.strengths.told:
            raise ValueError("[strengths] told: its weights cannot be shared out; set told = false, or shard = false")
    for question in config.train.questions():
        print(f"note: {question}")
    dataset = open_dataset(args, config)
    if config.train.preflight and not RunFolder(args.out).report.exists():
        check_memory(config, dataset)
    check_teacher_choice(config)
    stays, tunes = config.train.offload == NONE, config.method_config.tunes
    # What is shared out comes to the devices a block at a time; a turbo must make samples first.
    source = open_source(
        config.model, config.cache.embedded_guidance, on_device=stays and (tunes or not config.train.shard)
    )
    if not stays:
        keep_away(source.backend, config, accelerator.device if accelerator else source.device, args.out)
    elif accelerator and (tunes or not config.train.shard):
        source.backend.network.to(accelerator.device)
    if tunes:
        turbo = find_turbo(config, source, dataset.shapes[0])
        dataset = with_kept(config, source, turbo, dataset, args.out / "kept", accelerator)
        share_out(source.backend, config, accelerator)
        train_student(tuned(config, turbo), source, dataset, args.out / "student.safetensors", turbo, accelerator)
    else:
        share_out(source.backend, config, accelerator)
        device = accelerator.device if accelerator else source.device

        def place(backend: DiffusersBackend) -> None:
            if stays:
                backend.network.to(device)
            else:
                keep_away(backend, config, device, args.out / "teacher")

        usage = None if config.method_config.few_steps else teachers_recipe(config, source)
        teacher = open_teacher(config.teacher, config.model, source, place)
        train_student(config, source, dataset, args.out / "student.safetensors", usage, accelerator, teacher=teacher)


def check_teacher_choice(config: Config) -> None:
    """Raises ValueError for another teacher where there can be none."""
    if config.teacher.other and config.method_config.own_teacher:
        raise ValueError(own_teacher_only(config.method_config))
    if config.teacher.other and config.train.shard:
        raise ValueError(
            "another teacher cannot be shared out: leave [teacher] path and [teacher] lora empty, or set shard = false"
        )


def training_config(args: argparse.Namespace) -> Config:
    """CONFIG, without pre-flight where --no-preflight says so."""
    config = load_config(args.config)
    return replace(config, train=replace(config.train, preflight=config.train.preflight and not args.no_preflight))


def train_student(
    config: Config,
    source: MiniSource | PipelineSource,
    dataset: LatentDataset,
    student_file: Path,
    usage: Recipe | None = None,
    accelerator: Any = None,
    method: MethodConfig | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Train the student of ``config`` in the folder of its file, or go on, or say that it is done.

    usage: how it is sampled, where it is a turbo that is trained, or the model itself; None for a new student of
    [model] sampler.
    method: where it is none that ``config`` can choose.  teacher: another one than the model.
    """
    folder = RunFolder(student_file.parent)
    encode = lambda prompt: source.encode([prompt])[0]  # noqa: E731
    components = Components(source.backend, source.decode_with_gradient, source.encoder, encode, teacher=teacher)
    distance = perceptual_distance(config.model.perceptual, source.channels, components.device)
    run_config = describe(config, components, dataset, distance, usage, method)
    finished = folder.finished(run_config.request())
    if finished and student_file.exists():
        print(f"this run has ended: its student is {student_file}")
        if "said" in finished:
            print(f"note: {finished['said']}", file=sys.stderr)
        return
    run = new_run(run_config, components, dataset, folder.path, distance=distance, accelerator=accelerator)
    if config.train.preflight:
        preflight(run)
    for sentence in pairs_notes(run_config.method, dataset, source.backend.process, source.backend.limits()):
        print(f"note: {sentence}; `cache` with state_sigmas at these levels gives them pairs, too", file=sys.stderr)
    for sentence in teacher_notes(components, dataset):
        print(f"note: {sentence}", file=sys.stderr)
    try:
        with tqdm(total=config.train.steps, disable=not run.is_main) as bar, stop_after_step(run) as stop:
            line = StatusLine(config.train.log_every, tuple(run_config.method.terms), bar.write)
            watchers: list[Watcher] = [Progress(bar, run_config.method.terms), line] if run.is_main else []
            page = run_page(run, run_config, folder, source.decode, bar.write)
            with page if run.is_main else nullcontext():
                watchers += [page.take] if run.parts else []
                watchers += [page] if run.is_main else []
                measures = retention_listeners(run, run_config)
                said = train_to_end(run, run_config, folder, student_file, [*watchers, stop], measures)
                if said and run.is_main:
                    print(f"note: {said}", file=sys.stderr)
                    note(folder, said)
        if accelerator:  # a process that leaves while gloo still lets go of the last collective is aborted
            accelerator.wait_for_everyone()
    except OtherSettings as error:
        raise ValueError(error.said(key_of)) from None
    if run.step > config.train.steps:
        print(f"note: {longer(run.step, config.train.steps)}", file=sys.stderr)
    if run.is_main:
        title = run_config.method.title_with_terms()
        live_plots.curves(folder.logs(), title=title).save(folder.path / "curves.png")


def keep_away(backend: DiffusersBackend, config: Config, device: torch.device | str, folder: Path) -> None:
    """Offload the backbone as [train] offload says, in the number format that it is trained in."""
    if not config.model.gradient_checkpointing:
        raise ValueError("[train] offload needs [model] gradient_checkpointing = true: without it, it saves nothing")
    if config.train.mixed(torch.device(device)):
        halves_to_bfloat16(backend.network)
    backend.offload(device, config.train.offload, folder)


def share_out(backend: DiffusersBackend, config: Config, accelerator: Any) -> None:
    """Share the model out among the processes where [train] shard says so, in the format that it is computed in."""
    if not config.train.shard:
        return
    mixed = config.train.mixed(accelerator.device)
    if mixed:
        halves_to_bfloat16(backend.network)
    backend.share_out(Sharding(accelerator.device, torch.bfloat16 if mixed else None))


def run_page(
    run: Run, config: RunConfig, folder: RunFolder, decode: Callable[[Tensor], Tensor], say: Callable[[str], None]
) -> RunPage:
    """The run's page, with pictures of what the dataset's first prompts become."""
    images = lambda latents: (torch.cat([decode(x) for x in latents]).movedim(1, -1) + 1) / 2  # noqa: E731
    pictures = StudentPictures.of_items(run, config.student, first_items(run), images)
    train = config.train
    return RunPage(
        folder, config.request(), pictures, every=train.sample_every, write_every=train.checkpoint_every, say=say
    )


KEYS = {
    "method": "method",
    "student.rank": "[model] lora_rank",
    "student.targets": "[model] lora_targets",
    "student.sampler": "[model] sampler",
    "student.lora.alpha": "[lora] alpha",
    "student.lora.dropout": "[lora] dropout",
    **{f"student.strengths.{s.name}": f"[strengths] {s.name}" for s in settings_of(StrengthsConfig)},
    "start_from": "[lora] start_from",
    "adapter": "[lora] adapter",
    "below": "[model] loras",
    "guidance": "[teacher] guidance",
    "teacher": "[teacher] path or lora",
    "adapter.student_sigmas": "[model] preset",
    "taps": "[model] taps",
    "dtype": "[model] dtype",
    "base": "[model] path",
    "perceptual": "[model] perceptual",
    "dataset": "--data (or [data] mix)",
}


def open_dataset(args: argparse.Namespace, config: Config) -> LatentDataset:
    """The dataset of --data, or those of [data] mix. Raises ValueError unless it is one of the two."""
    mix = config.data.mix
    if bool(args.data) == bool(mix):
        raise ValueError(
            "both --data and [data] mix say what to learn from: give one of them"
            if mix
            else "give --data FOLDER, or several folders with weights in [data] mix"
        )
    return open_data(new_mix({Path(folder): weight for folder, weight in mix.items()}) if mix else args.data)


def key_of(name: str) -> str:
    """The key in the TOML file of a setting's dotted name."""
    section, _, rest = name.partition(".")
    if name in KEYS:
        return KEYS[name]
    if section in SECTIONS:
        return f"[{section}] {rest}" if rest else "method"
    return f"[train] {name}"


def describe(
    config: Config,
    components: Components,
    dataset: LatentDataset,
    distance: ELatentLPIPS | None,
    usage: Recipe | None = None,
    method: MethodConfig | None = None,
) -> RunConfig:
    """What decides the run, known before anything is made for it."""
    identities: dict[str, Any] = {
        "base": components.backend.digest(),
        "dataset": dataset.digest(),
        "dtype": config.model.dtype,
    }
    if distance is not None:
        identities["perceptual"] = distance.identity()
    teacher = components.teacher
    if teacher is not None:
        identities["teacher"] = teacher.digest
    if components.backend.below:
        identities["below"] = [lora.below() for lora in components.backend.below]
    run = config.run(identities)
    if usage is not None:
        student = replace(run.student, sampler=usage.sampler, sampler_options=usage.sampler_options, cfg=usage.cfg)
        run = replace(run, student=student)
    return run if method is None else replace(run, method=method)


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
        self.latest: dict[str, float] = {}

    def __call__(self, event: Event, condition: Condition) -> None:
        self.bar.update(event.step - self.bar.n)
        self.latest |= event.logs
        figures = {name: f"{self.latest[name]:.3f}" for name in self.shown if name in self.latest}
        self.bar.set_postfix({**figures, "health": condition.word})


class Stop:
    """Ends the run after the step in which it was asked to; one whose weights are shared out, in all processes."""

    def __init__(self, run: Run) -> None:
        self.run, self.signal = run, 0

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.run.parts and not self.run.parts.all_agree(not self.signal):
            self.signal = self.signal or signal.SIGTERM
        if self.signal and event.step < event.steps:
            raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


@contextmanager
def stop_after_step(run: Run) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM let the running step end first; a second one stops at once."""
    stop = Stop(run)

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
