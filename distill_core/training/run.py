"""A training run from its settings to its files: made, trained to its end, resumed and saved in one way.

The command line and the trainer nodes both do: describe it (`RunConfig`), make it (`new_run`), check it (`preflight`),
and `train_to_end`. What they add are listeners: a progress bar, a picture on the node, a stop button.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import check_pairs
from ..data.dataset import LatentDataset
from ..data.fits import check_fits, check_teacher
from ..diffusion.process import NoiseProcess
from ..diffusion.schedules import same_level, shift_sigmas
from ..digests import file_digest
from ..files import alone_in
from ..lora_files import save_lora
from ..methods.base import Distance
from ..methods.components import Components, DiscriminatorConfig, VisionConfig
from ..methods.config import OWN, MethodConfig
from ..methods.registry import new_method
from ..models.denoiser import Limits
from ..models.guidance import guided
from ..models.lora_stack import frozen_lora
from ..models.offload import to_host
from ..models.precision import channels_last, halves_to_bfloat16
from ..settings import decisive
from .keeping import Keeping
from .loop import Event, Listener, Run, train
from .loop_config import TrainConfig
from .monitor import Condition, Health, Monitor
from .other_teacher import check_other_teacher, maker
from .progress import Snapshots
from .run_folder import LogFile, RunFolder
from .student import StudentConfig, check_strengths, pick_targets, start_from, strengths_told
from .trackers import Trackers
from .validation import Validation

ENDS_ALL = (KeyboardInterrupt, SystemExit, FloatingPointError)  # all processes end by these after the same step
IDENTITIES = ("base", "dataset")  # what every run must name


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a training run becomes: runs with equal descriptions are the same run.

    taps: blocks that heads read, empty for the method's own choice.  guidance: of the teacher, None for the dataset's.
    identities: digests of what the settings cannot say, anything JSON by name: "base" (the model) and "dataset" always,
    and what else takes part (autoencoder, vision network, perceptual metric, another teacher than the model).
    Raises ValueError when one of the first two is missing.
    """

    method: MethodConfig
    train: TrainConfig
    student: StudentConfig
    identities: dict[str, Any]
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    vision: VisionConfig = VisionConfig()
    taps: tuple[str, ...] = ()
    guidance: float | None = None

    def __post_init__(self) -> None:
        missing = [name for name in IDENTITIES if name not in self.identities]
        if missing:
            raise ValueError(f"a run must say what it is made from: {', '.join(missing)} is missing in its identities")

    def description(self) -> dict[str, Any]:
        """What must agree when a run goes on, beside the loop's settings (`Run.settings` has both)."""
        return {
            self.method.name: decisive(self.method),
            "student": decisive(self.student),
            **{section: decisive(getattr(self, section)) for section in self.method.sections},
            "taps": list(self.taps),
            "guidance": self.guidance,
            **({"start_from": file_digest(start)} if (start := self.student.lora.start_from) else {}),
            **({"adapter": file_digest(adapter)} if (adapter := self.student.lora.adapter) else {}),
            **self.identities,
        }

    def request(self) -> dict[str, Any]:
        """`description` with the loop's settings and the number of steps: what a finished run has answered."""
        rule = {"keep_at_least": self.train.keep_at_least} if self.train.keep_at_least else {}
        return {**decisive(self.train), "steps": self.train.steps, **rule, **self.description()}


def new_run(
    config: RunConfig,
    components: Components,
    dataset: LatentDataset,
    folder: str | Path | None = None,
    *,
    distance: Distance | None = None,
    path_tolerance: float = 0.05,
    accelerator: Any = None,
) -> Run:
    """A student and the method's discriminator on one backbone, or on two where all weights are trained.

    distance: of the pairs and consistency terms, None for the method's ``regression``.  path_tolerance: how far a path
    that is run again may end from the stored latent (`check_pairs`, for methods that live on pairs).
    Every new weight comes from the training seed; torch's own random state is as before. Raises ValueError for
    components that are missing or pairs that the teacher does not make.
    """
    backend, method, device = components.backend, config.method, components.device
    guidance = dataset.manifest()["guidance"]
    check_fits(dataset, backend.limits(), method.needs)
    check_strengths(config.student.strengths, dataset)
    if components.teacher is not None:
        check_other_teacher(components.teacher, method, backend, dataset.batch(0, 1, config.train.seed).to(device))
    elif method.weight("pairs"):
        check_teacher(dataset, config.identities["base"])
    if (
        method.weight("adversarial")
        and method.adversarial_on == OWN
        and all(member.state_sigmas for member in dataset.members)
    ):
        raise ValueError(
            f'adversarial_on = "own" judges pictures, and {dataset.folder} has none: mix some in ([data] mix), or set '
            'adversarial_on = "both"'
        )
    if method.checks_paths and method.weight("pairs"):
        for member in dataset.members:  # each must have some, and the teacher's
            if (view := maker(components, member, config.identities["base"])) is not None:
                check_pairs(member, guided(view, member.uncond().to(device), guidance), path_tolerance)
    return assemble(config, components, dataset, folder, distance=distance, accelerator=accelerator)


def assemble(
    config: RunConfig,
    components: Components,
    dataset: LatentDataset,
    folder: str | Path | None = None,
    *,
    distance: Distance | None = None,
    accelerator: Any = None,
) -> Run:
    """`new_run` without its checks of the dataset."""
    backend, method, train_config, device = components.backend, config.method, config.train, components.device
    guidance, uncond = dataset.manifest()["guidance"], dataset.uncond().to(device)
    if train_config.compile and config.student.lora.dropout:
        raise ValueError("compile goes with no dropout: each layer's draw is its own; set one of them to 0 or false")
    for frozen in components.backends:
        if train_config.mixed(device):
            halves_to_bfloat16(frozen.network)
        if train_config.channels_last:
            channels_last(frozen.network)
        if train_config.compile:
            frozen.compile()
    student = config.student
    targets = pick_targets(backend.lora_targets(), student.targets) if student.rank and student.targets else ()
    example = dataset.batch(0, train_config.batch_size, train_config.seed).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(train_config.seed)
        built = new_method(
            method,
            components,
            example,
            student.rank,
            targets=targets,
            strengths=student.strengths,
            uncond=uncond,
            guidance=guidance if config.guidance is None else config.guidance,
            distance=distance,
            taps=config.taps,
            discriminator=config.discriminator,
            vision=config.vision,
        )
    if (lora := built.student.lora) is not None:
        lora.configure(student.lora)
        if student.lora.start_from:
            start_from(backend, lora, Path(student.lora.start_from), built.student.strengths)
        if student.lora.adapter:
            if [name for name, weight in method.terms.items() if weight] != ["denoising"]:
                raise ValueError(
                    "an adapter is for ordinary training: give the denoising term alone a weight, or leave adapter "
                    "empty"
                )
            lora.over = (frozen_lora(backend, student.lora.adapter, "adapter"),)
    if train_config.offload_activations and device.type == "cuda":
        for frozen in components.backends:
            frozen.switch.keep_inputs = to_host
    return Run(built, dataset, train_config, folder, config.description(), accelerator)


def pairs_notes(method: MethodConfig, dataset: LatentDataset, process: NoiseProcess, limits: Limits) -> list[str]:
    """What is to be said of a student some of whose levels have no pairs; nothing where all or none have.

    limits: of the network, where the levels depend on the size of the latents.
    """
    stored = dataset.state_sigmas
    shifts = {method.shift(limits.tokens(*size)): size for _, *size in reversed(dataset.shapes)}
    spell = lambda levels: ", ".join(f"{level:.6g}" for level in levels)  # noqa: E731
    notes = []
    for shift, (height, width) in reversed(shifts.items()):
        levels = shift_sigmas(torch.tensor(method.levels(process)).double(), shift_alpha=shift).tolist()
        without = [level for level in levels if not any(same_level(s, level) for s in stored)]
        if method.weight("pairs") and without and len(without) < len(levels):
            where = f" on latents of {width} x {height}" if len(shifts) > 1 else ""
            notes.append(
                f"the pairs term works at some of the student's levels only{where}: {spell(without)} of "
                f"{spell(levels)} have no pairs in {dataset.folder.name} (it keeps {spell(stored)})"
            )
    return notes


def longer(done: int, steps: int) -> str:
    """What is to be said of a run that had gone further than it is asked for now."""
    return (
        f"this run has already done {done} steps, and steps is {steps} now: the student is that of step {done}; for a "
        "shorter run choose another name or folder"
    )


Watcher = Callable[[Event, Condition], None]


def train_to_end(
    run: Run,
    config: RunConfig,
    folder: RunFolder,
    student_file: str | Path,
    watchers: Sequence[Watcher] = (),
    listeners: Sequence[Listener] = (),
) -> str:
    """Train to the last step, write the student's file and note in the folder that the run has ended.

    Returns what is to be said of what its student kept (`keeping`), "" for nothing.
    watchers: called after each step, once its log is on disk; one that raises stops the run.  listeners: called before,
    and may add to the step's logs (`evaluation.retention_watch`). Whatever ends a run early
    (a watcher, a cancel, `monitor.Collapse`, an error), its checkpoint and the student of the last step are written,
    and the log ends with that step. Raises ValueError before the first step while another process trains in the folder.
    """
    with alone_in(folder.path, "training") if run.is_main else nullcontext():
        return _train_alone(run, config, folder, student_file, watchers, listeners)


def _train_alone(
    run: Run,
    config: RunConfig,
    folder: RunFolder,
    student_file: str | Path,
    watchers: Sequence[Watcher],
    listeners: Sequence[Listener],
) -> str:
    run.resume()
    log, health, validation = LogFile(folder), Health(), Validation(run)
    health.replay(entry for entry in folder.logs() if entry["step"] <= run.step)
    trackers = Trackers(config.train.trackers if run.is_main else (), folder.path, decisive(config.train))
    save = partial(save_student, run, config)
    keeping = Keeping(config.train.keep_at_least, folder.path / "kept.safetensors", save)
    keeping.resume((entry for entry in folder.logs() if entry["step"] <= run.step), run.step)
    snapshots = Snapshots(config.train.snapshot_every, Path(student_file), save)
    all_watchers: list[Watcher] = [log, trackers] if run.is_main else []
    all_watchers += [snapshots, keeping, *watchers]
    try:
        with (
            Monitor(run, health) as monitor,
            closing(log),
            closing(trackers),
            closing(train(run, [validation, *listeners, monitor])) as events,
        ):
            for event in events if not keeping.lost else ():
                for watch in all_watchers:
                    watch(event, monitor.condition)
                if keeping.lost:
                    break
    except BaseException as error:  # a cancel in the host is no Exception
        if run.is_main and folder.log.exists():
            folder.keep_log(run.step)
        if not run.parts or isinstance(error, ENDS_ALL):
            save_stopped(run, config, student_file)
        raise
    if not keeping.lost:
        save(Path(student_file))
    if run.is_main:
        if keeping.lost:
            keeping.finish(Path(student_file))
        folder.finish(config.request(), **({"said": keeping.said} if keeping.said else {}))
    return keeping.said


def save_stopped(run: Run, config: RunConfig, student_file: str | Path) -> None:
    """The student of a run that stopped early, if it has done a step; a full disk must not hide why it stopped."""
    if run.step == 0:
        return
    try:
        save_student(run, config, student_file)
    except OSError as error:
        logging.warning("the student of the stopped run could not be written: %s", error)


def save_student(run: Run, config: RunConfig, path: str | Path) -> None:
    """Write the student's file, which the first process does. Where the weights are shared out, all must ask."""
    if run.is_main or run.parts:
        state, description = student_of(run, config)
        if run.is_main:
            save_lora(path, state, description)


def told_guidance(run: Run) -> dict[str, float]:
    """The guidance scale that the network was told as an input in training; nothing where it is told none."""
    told = run.batch(0)[0].cond.guidance
    return {} if told is None else {"embedded_guidance": told.float().mean().item()}


def reference_pixels(method: MethodConfig, limits: Limits) -> dict[str, int]:
    """The pixels of a picture that the levels are meant for, where others have them shifted; nothing where none has."""
    side = limits.token_side * limits.pixels
    return {"reference_pixels": method.reference_tokens * side**2} if method.reference_tokens else {}


def student_of(run: Run, config: RunConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged student's tensors (a LoRA, or the differences of all weights), and the description that
    `lora_files.save_lora` writes beside them."""
    denoiser, method, members = run.method.student, config.method, run.dataset.members
    told: dict[str, Any] = {}
    mix = {"mix": [member.digest() for member in members]} if len(members) > 1 else {}  # which `evaluate` knows again
    usage = {
        "sigmas": list(run.method.levels),
        "sampler": config.student.sampler,
        "sampler_options": config.student.sampler_options,
        "cfg": config.student.cfg,
        **reference_pixels(method, denoiser.base.limits()),
    }
    with run.ema_weights():
        state = denoiser.backend.export(denoiser.lora)
        if denoiser.strengths is not None:
            state |= denoiser.strengths.export()
            told = {"strengths": strengths_told(denoiser.strengths.config, run.dataset)}
    return state, {
        "method": method.title_with_terms(),
        "weights": "lora" if denoiser.lora else "differences",
        **(usage if method.few_steps else {}),
        **({"adapter": Path(config.student.lora.adapter).name} if config.student.lora.adapter else {}),
        **told_guidance(run),
        **told,
        **denoiser.base.description(),
        **({"teacher": run.method.teacher.name} if run.method.teacher.name else {}),
        "steps": run.step,
        "config": {**config.description(), **mix, "train": decisive(run.config)},
    }
