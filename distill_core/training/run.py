"""A training run in a folder of its own: its checkpoint, its log on disk, and the report that says it has ended."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.dataset import LatentDataset
from ..files import save_json
from ..methods.base import Distance, MethodConfig
from ..methods.registry import Components, DiscriminatorConfig, VisionConfig, name_of, new_method, title_of
from ..settings import setting
from .loop import Event, Run, TrainConfig
from .monitor import Condition, Health, watched

NAME = re.compile(r"[\w][\w .+-]{0,99}")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}


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


class RunFolder:
    """log.jsonl (a line a step), checkpoint.safetensors (written by `train.Run`), report.json (once it has ended)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    def logs(self) -> list[dict[str, float]]:
        """The logs of all steps so far, ``step`` among them; a line cut off by a crash is left out."""
        entries = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def follow(self, run: Run) -> Iterator[tuple[Event, Condition]]:
        """`health.watched` with its log on disk. After a crash the log goes on where the checkpoint does."""
        events, file = watched(run), None
        try:
            for event, condition in events:
                if file is None:
                    file = self._log_from(event.step)
                file.write(json.dumps({"step": event.step, **event.logs}) + "\n")
                file.flush()
                yield event, condition
        finally:
            events.close()  # writes the checkpoint now, not whenever the generator is collected
            if file is not None:
                file.close()

    def condition(self) -> Condition | None:
        """How the run was doing at its last step, None before the first."""
        health, condition = Health(), None
        for entry in self.logs():
            condition = health.update(entry)
        return condition

    def _log_from(self, step: int):
        """The log, opened for step ``step``: what a killed run wrote after its last checkpoint is dropped."""
        kept = [json.dumps(entry) + "\n" for entry in self.logs() if entry["step"] < step]
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.log.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.log)
        return open(self.log, "a")

    def start(self, **facts) -> None:
        """Note what the run is made from, for who looks at it later."""
        save_json(self.path / "started.json", facts)

    def started(self) -> dict:
        """What `start` noted. Raises ValueError where there is no run."""
        try:
            return json.loads((self.path / "started.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"there is no run in {self.path}") from None

    def finish(self, asked: dict, **results) -> None:
        """Say that what was ``asked`` for is done."""
        save_json(self.report, {"asked": asked, **results})

    def finished(self, asked: dict) -> dict | None:
        """The report of a run that has ended and was asked for the same; None for any other."""
        try:
            report = json.loads(self.report.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return report if report.get("asked") == json.loads(json.dumps(asked)) else None


@dataclass(frozen=True)
class StudentConfig:
    """What a student made in a graph is, and what it is to be sampled with."""

    rank: int = setting(64, "Rank of the student's LoRA. 0: no LoRA; all weights of a second copy are trained.")
    targets: tuple[str, ...] = setting(
        (), "Names of the linear layers that the LoRA changes. Empty: all those in the model's blocks."
    )
    sampler: str = setting("renoise", "The sampler the student is meant for, written into its file.")
    sampler_options: dict[str, float] = setting({}, 'Options of that sampler, such as eta for "ancestral".')


def pick_targets(names: Sequence[str], parts: str) -> tuple[str, ...]:
    """The layers whose name contains one of the comma-separated ``parts``; all of them for an empty text.

    Raises ValueError when there is none.
    """
    wanted = [part.strip() for part in parts.split(",") if part.strip()]
    found = tuple(name for name in names if not wanted or any(part in name for part in wanted))
    if not found:
        raise ValueError(f"no layer's name contains {' or '.join(wanted)}; names look like {', '.join(names[:4])}")
    return found


def new_run(
    parts: Components,
    dataset: LatentDataset,
    method: MethodConfig,
    config: TrainConfig,
    student: StudentConfig,
    taps: Sequence[str],
    folder: str | Path | None = None,
    heads: DiscriminatorConfig = DiscriminatorConfig(),
    vision: VisionConfig = VisionConfig(),
    distance: Distance | None = None,
    guidance: float | None = None,
    beside: dict | None = None,
    processes=None,
) -> Run:
    """A student and the method's discriminator on one backbone, or on two where all weights are trained.

    taps: blocks that its heads read, empty for the method's own.  guidance: of the teacher, None for that of the
    dataset.  beside: what else decides the run, anything JSON, e.g. the identity of the autoencoder.
    Every new weight comes from the training seed; torch's own random state is as before.
    """
    backend = parts.backend
    device = next(backend.network.parameters()).device
    guidance = dataset.manifest()["guidance"] if guidance is None else guidance
    uncond = dataset.uncond().to(device)
    example = dataset.batch(0, config.batch_size, config.seed).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        built = new_method(
            method, parts, example, student.rank, uncond, guidance, student.targets, taps, heads, vision, distance
        )
    described = {name_of(method): asdict(method), "student": asdict(student), "base": backend.description()["base"]}
    described |= {"taps": list(taps), "heads": asdict(heads), **(beside or {})}
    return Run(built, dataset, config, folder, described, processes)


def student_of(run: Run, student: StudentConfig) -> tuple[dict[str, Tensor], dict]:
    """The averaged student as a LoRA's tensors (or what its backend exports of all weights), and the description that
    `checkpoint.save_lora` writes beside them."""
    denoiser, method = run.method.student, run.method.config
    with run.ema_weights():
        state = denoiser.backend.export(denoiser.lora)
    base = run.method.teacher.backend.description()
    return state, {
        "method": title_of(method),
        "weights": "lora" if denoiser.lora else "differences",
        "sigmas": list(run.method.levels),
        "sampler": student.sampler,
        "sampler_options": student.sampler_options,
        "cfg": 1.0,
        **base,
        "steps": run.step,
        "config": {name_of(method): asdict(method), "train": asdict(run.config), "student": asdict(student)},
    }
