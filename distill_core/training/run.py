"""A training run from its settings to its files: made, trained to its end, resumed and saved in one way.

The command line and the trainer nodes both do: describe it (`RunConfig`), make it (`new_run`), check it (`preflight`),
and `train_to_end`. What they add are listeners: a progress bar, a picture on the node, a stop button.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import check_pairs
from ..data.dataset import LatentDataset
from ..files import save_json, save_lora
from ..methods.base import Distance
from ..methods.components import Components, DiscriminatorConfig, VisionConfig
from ..methods.config import MethodConfig
from ..methods.registry import new_method
from ..models.denoiser import Denoiser, Guided
from ..settings import decisive, setting
from .loop import Event, Run, TrainConfig, train
from .monitor import Condition, Health, Monitor

NAME = re.compile(r"[\w][\w .+-]{0,99}")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
IDENTITIES = ("base", "dataset")  # what every run must name


def folder_in(root: str | Path, name: str, what: str = "run name") -> Path:
    """The folder ``name`` directly inside ``root``.

    Raises ValueError for a name that is empty, longer than 100 characters, has anything but letters, digits, spaces
    and ``_ . + -``, or could lead out of ``root``.
    """
    name = name.strip()
    fits = NAME.fullmatch(name) and not name.endswith(".") and name.split(".")[0].lower() not in RESERVED
    root = Path(root).resolve()
    if not fits or (root / name).resolve().parent != root:
        raise ValueError(
            f"{what} {name!r} cannot be a folder inside {root.name}: use letters, digits, spaces and _ . + - "
            "(no slashes; the first character a letter or digit)"
        )
    return root / name


@dataclass(frozen=True)
class StudentConfig:
    """The student, and what it is to be sampled with."""

    rank: int = setting(64, "Rank of the student's LoRA. 0 trains all weights of a copy of the model instead.")
    targets: tuple[str, ...] = setting(
        (),
        "Linear layers that the LoRA trains, by their names or parts of them, such as attn. Empty: all in the blocks.",
    )
    sampler: str = setting("renoise", "Sampler that the student is meant for. It is written into the student's file.")
    sampler_options: dict[str, float] = setting({}, "Options of that sampler, for example eta.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a training run becomes: runs with equal descriptions are the same run.

    taps: blocks that heads read, empty for the method's own choice.  guidance: of the teacher, None for the dataset's.
    identities: digests of what the settings cannot say, anything JSON by name: "base" (the model) and "dataset" always,
    and what else takes part (autoencoder, vision network, perceptual metric).
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
            **self.identities,
        }

    def request(self) -> dict[str, Any]:
        """`description` with the loop's settings and the number of steps: what a finished run has answered."""
        return {**decisive(self.train), "steps": self.train.steps, **self.description()}


class RunFolder:
    """log.jsonl (a line a step), checkpoint.safetensors (written by `loop.Run`), report.json (once it has ended)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    def logs(self) -> list[dict[str, Any]]:
        """The logs of all steps so far, ``step`` and ``health`` among them; a line cut off by a crash is left out."""
        entries = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def condition(self) -> Condition | None:
        """How the run was doing at its last step, None before the first."""
        health, condition = Health(), None
        for entry in self.logs():
            condition = health.update(entry)
        return condition

    def start(self, **facts: Any) -> None:
        """Note what the run is made from, for who looks at it later."""
        save_json(self.path / "started.json", facts)

    def started(self) -> dict:
        """What `start` noted. Raises ValueError where there is no run."""
        try:
            return json.loads((self.path / "started.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"there is no run in {self.path}") from None

    def finish(self, request: dict[str, Any], **results: Any) -> None:
        """Say that what was requested (`RunConfig.request`) is done."""
        save_json(self.report, {"request": request, **results})

    def finished(self, request: dict[str, Any]) -> dict | None:
        """The report of a run that has ended and was requested in the same words; None for any other."""
        try:
            report = json.loads(self.report.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return report if report.get("request") == json.loads(json.dumps(request)) else None


class LogFile:
    """Writes a run's log. After a crash it goes on where the checkpoint does: later lines are dropped."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.file: Any = None  # opened at the first step, when it is known where the run goes on

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.file is None:
            self.file = self._open(event.step)
        self.file.write(json.dumps({"step": event.step, **event.logs, "health": condition.word}) + "\n")
        self.file.flush()

    def _open(self, step: int) -> Any:
        kept = [json.dumps(entry) + "\n" for entry in self.folder.logs() if entry["step"] < step]
        self.folder.path.mkdir(parents=True, exist_ok=True)
        temporary = self.folder.log.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.folder.log)
        return open(self.folder.log, "a")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def pick_targets(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """The layers that ``wanted`` asks for, each by its whole name or, where no layer has that, by a part of it.

    All of them where nothing is wanted. Raises ValueError for a text that fits no layer.
    """
    chosen = set(names if not wanted else ())
    for text in wanted:
        fitting = [text] if text in names else [name for name in names if text in name]
        if not fitting:
            raise ValueError(f"LoRA targets: no layer's name contains {text}; names look like {', '.join(names[:4])}")
        chosen.update(fitting)
    return tuple(name for name in names if name in chosen)


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
    backend, method, train_config, device = components.backend, config.method, config.train, components.device
    guidance, uncond = dataset.manifest()["guidance"], dataset.uncond().to(device)
    if method.checks_paths and method.weight("pairs"):
        check_pairs(dataset, Guided(Denoiser(backend), uncond, guidance), path_tolerance)
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
            uncond=uncond,
            guidance=guidance if config.guidance is None else config.guidance,
            distance=distance,
            taps=config.taps,
            discriminator=config.discriminator,
            vision=config.vision,
        )
    return Run(built, dataset, train_config, folder, config.description(), accelerator)


Watcher = Callable[[Event, Condition], None]


def train_to_end(
    run: Run, config: RunConfig, folder: RunFolder, student_file: str | Path, watchers: Sequence[Watcher] = ()
) -> None:
    """Train to the last step, write the student's file and note in the folder that the run has ended.

    watchers: called after each step, once its log is on disk; one that raises stops the run. Whatever ends a run early
    (a watcher, a cancel, `monitor.Collapse`, an error), its checkpoint and the student of the last step are written.
    """
    log = LogFile(folder)
    all_watchers: list[Watcher] = [log, *watchers] if run.is_main else [*watchers]
    try:
        with Monitor(run) as monitor, closing(log), closing(train(run, [monitor])) as events:
            for event in events:
                for watch in all_watchers:
                    watch(event, monitor.condition)
    except BaseException:  # a cancel in the host is no Exception
        save_stopped(run, config, student_file)
        raise
    if run.is_main:
        save_lora(student_file, *student_of(run, config))
        folder.finish(config.request())


def save_stopped(run: Run, config: RunConfig, student_file: str | Path) -> None:
    """The student of a run that stopped early, if it has done a step; a full disk must not hide why it stopped."""
    if run.step == 0 or not run.is_main:
        return
    try:
        save_lora(student_file, *student_of(run, config))
    except OSError as error:
        logging.warning("the student of the stopped run could not be written: %s", error)


def student_of(run: Run, config: RunConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged student's tensors (a LoRA, or the differences of all weights), and the description that
    `files.save_lora` writes beside them."""
    denoiser, method = run.method.student, config.method
    with run.ema_weights():
        state = denoiser.backend.export(denoiser.lora)
    return state, {
        "method": method.title_with_terms(),
        "weights": "lora" if denoiser.lora else "differences",
        "sigmas": list(run.method.levels),
        "sampler": config.student.sampler,
        "sampler_options": config.student.sampler_options,
        "cfg": 1.0,
        **run.method.teacher.backend.description(),
        "steps": run.step,
        "config": {**config.description(), "train": decisive(run.config)},
    }
