"""The one training loop. ``for event in train(run): ...`` - leaving the loop at any event keeps a checkpoint.

A step runs each phase (a loss, its parameters, its optimiser) once per micro-batch and then lets every optimiser step,
so the discriminator reuses the features the student's loss has just computed. All randomness comes from (seed,
item number): a resumed run, or one on several processes, draws what one uninterrupted process would.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.dataset import LatentDataset
from ..diffusion.noise import ItemNoise
from ..files import load_tensors, save_tensors
from ..settings import setting

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop, the same for every method."""

    steps: int = setting(1000, "Optimiser steps of the whole run. A finished run may be made longer.", decides=False)
    batch_size: int = setting(
        4, "Items of one micro-batch, summed over all processes; at least 2 per process with the hinge loss."
    )
    accumulation: int = setting(1, "Micro-batches whose gradients are averaged for one optimiser step.")
    student_lr: float = setting(
        1e-4,
        "Learning rate of the student. 1e-5 is usual for a LoRA on a large model (Flash Diffusion), 2e-6 when all "
        "weights are trained (SANA-Sprint); the tiny mini model takes 2e-4 to 6e-4.",
    )
    discriminator_lr: float = setting(
        1e-3, "Learning rate of the discriminator, usually about ten times the student's: its heads start from nothing."
    )
    discriminator_updates: int = setting(
        1, "Discriminator updates for each update of the student; those after the first see freshly drawn noise."
    )
    betas: tuple[float, float] = setting(
        (0.0, 0.99), "Decay rates of AdamW's two moments. The first is 0 in StyleGAN-T, whose training ADD follows."
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW, for the student and the discriminator.")
    gradient_clip: float = setting(10.0, "Largest norm of a gradient; a longer one is scaled down to it.")
    warmup_steps: int = setting(10, "Steps over which both learning rates rise linearly to their full value.")
    decay_from: float = setting(
        0.7, "Part of the run (0 to 1) after which both learning rates fall linearly to 0; 1 keeps them constant."
    )
    ema_decay: float = setting(
        0.99,
        "Decay of the moving average (EMA) of the student's weights, from 0 to below 1. The average is what is saved.",
    )
    precision: str = setting(
        "auto",
        'Arithmetic of the networks: "float32", "bfloat16", or "auto" for bfloat16 on a device that supports it and '
        "float32 on a CPU.",
    )
    checkpoint_every: int = setting(250, "Steps between checkpoints. Stopping a run writes one too.", decides=False)
    seed: int = setting(0, "Seed of everything random: new weights, batches and noise.")

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulation, self.discriminator_updates, self.checkpoint_every) < 1:
            raise ValueError(
                "steps, batch_size, accumulation, discriminator_updates, checkpoint_every must be at least 1"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {self.ema_decay}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, not {self.precision!r}")

    def rate(self, step: int) -> float:
        """The factor on both learning rates at a step."""
        fall = (self.steps - step) / max(1.0, (1 - self.decay_from) * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), fall)


@dataclass(frozen=True)
class Phase:
    """One player: what it minimises, with which parameters and rate, and how often a step.

    rate_of: factor on ``lr`` by parameter name.
    """

    name: str
    loss: Callable
    parameters: dict[str, nn.Parameter]
    lr: float
    updates: int = 1
    rate_of: Callable[[str], float] = lambda name: 1.0

    def groups(self) -> list[dict]:
        """Optimiser groups in the order of the parameters, one for each run of equal factors."""
        runs = groupby(self.parameters.items(), key=lambda item: self.rate_of(item[0]))
        return [{"params": [value for _, value in items], "factor": factor} for factor, items in runs]


@dataclass(frozen=True)
class Event:
    """What a listener learns after each step: losses, discriminator health, gradient norms, learning rate factor."""

    step: int
    steps: int
    logs: dict[str, float] = field(default_factory=dict)


class Run:
    """The state of one training run: phases, optimisers, the student's moving average, the step counter.

    folder: where the checkpoint lies (None keeps nothing).  processes: an ``accelerate.Accelerator`` or None.
    description: anything JSON that must agree on resume, e.g. the method's config and the base's fingerprint.
    """

    def __init__(
        self,
        method,
        dataset: LatentDataset,
        config: TrainConfig,
        folder: str | Path | None = None,
        description: dict | None = None,
        processes=None,
    ) -> None:
        self.method, self.dataset, self.config, self.processes = method, dataset, config, processes
        self.folder = Path(folder) if folder else None
        self.description = json.loads(json.dumps(description or {}))
        self.phases = phases_of(method, config)
        self.optimizers = {
            phase.name: torch.optim.AdamW(
                phase.groups(), phase.lr, betas=config.betas, eps=1e-8, weight_decay=config.weight_decay
            )
            for phase in self.phases
        }
        # Statistics that a discriminator keeps beside its weights, e.g. of spectral norms.
        self.buffers = dict(method.discriminator.named_buffers()) if method.adversarial else {}
        self.ema = {name: value.detach().clone() for name, value in self.student_parameters.items()}
        self.step = 0
        self.between_steps = True  # False while a step has updated some of the weights and not yet all
        rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
        if config.batch_size % world:
            raise ValueError(f"batch_size {config.batch_size} does not divide among {world} processes")
        share = config.batch_size // world
        self.rows = slice(rank * share, (rank + 1) * share)
        self.is_main = rank == 0

    @property
    def student_parameters(self) -> dict[str, nn.Parameter]:
        return self.phases[0].parameters

    @property
    def device(self) -> torch.device:
        return next(iter(self.student_parameters.values())).device

    @property
    def checkpoint(self) -> Path | None:
        return self.folder / "checkpoint.safetensors" if self.folder else None

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The student with its averaged weights, for sampling and saving; the trained ones come back afterwards."""
        trained = {name: value.detach().clone() for name, value in self.student_parameters.items()}
        copy_into(self.student_parameters, self.ema)
        try:
            yield
        finally:
            copy_into(self.student_parameters, trained)

    def batch(self, micro: int):
        """Micro-batch ``micro`` of the current step and the randomness of its items."""
        config = self.config
        number = self.step * config.accumulation + micro
        batch = self.dataset.batch(number, config.batch_size, config.seed, self.rows).to(self.device)
        first = number * config.batch_size
        return batch, ItemNoise(config.seed, range(first + self.rows.start, first + self.rows.stop))

    def save(self) -> None:
        """Write the checkpoint: trained weights, average, optimisers, position and settings."""
        if self.checkpoint is None or not self.is_main:
            return
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"buffer.{name}": value for name, value in self.buffers.items()}
        for phase in self.phases:
            tensors |= {f"{phase.name}.{name}": value for name, value in phase.parameters.items()}
            bad = [name for name, value in phase.parameters.items() if not torch.isfinite(value).all()]
            if bad:
                raise FloatingPointError(
                    f"{phase.name} weights are not finite after step {self.step} ({bad[0]}); the last checkpoint stays"
                )
            moments = self.optimizers[phase.name].state_dict()["state"]
            for index, name in enumerate(phase.parameters):
                values = moments.get(index, {}).items()
                tensors |= {f"optimizer.{phase.name}.{name}.{key}": value for key, value in values}
        state = {"step": self.step, "settings": self.settings()}
        save_tensors(self.checkpoint, tensors, {"run": json.dumps(state)})

    def settings(self) -> dict:
        """What must agree between a checkpoint and the run that goes on from it (a run may be made longer)."""
        fixed = {k: v for k, v in asdict(self.config).items() if k not in ("steps", "checkpoint_every")}
        return json.loads(json.dumps({**fixed, **self.description}))

    def resume(self) -> bool:
        """Go on from the checkpoint if there is one. Raises ValueError for one that is damaged or of another run."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        tensors, metadata = load_tensors(self.checkpoint)
        if "run" not in metadata:
            raise ValueError(f"{self.checkpoint} is not a training checkpoint of this project")
        state = json.loads(metadata["run"])
        mine, theirs = self.settings(), state["settings"]
        changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if changed:
            raise ValueError(
                f"{self.checkpoint} belongs to a run with other settings ({', '.join(changed)}); choose another output "
                "folder, or delete the checkpoint to start again"
            )
        self._load(tensors)
        self.step = state["step"]
        return True

    def _load(self, tensors: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        copy_into(self.ema, part("ema."))
        copy_into(self.buffers, part("buffer."))
        for phase in self.phases:
            copy_into(phase.parameters, part(f"{phase.name}."))
            moments = part(f"optimizer.{phase.name}.")
            optimizer = self.optimizers[phase.name]
            state = optimizer.state_dict()
            for index, name in enumerate(phase.parameters):
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.step" in moments:
                    state["state"][index] = {key: moments[f"{name}.{key}"] for key in keys}
            optimizer.load_state_dict(state)


def phases_of(method, config: TrainConfig) -> list[Phase]:
    """The generator phase and, when the method is adversarial, the discriminator phase."""
    phases = [Phase("generator", method.generator_loss, method.student.trainable(), config.student_lr)]
    if method.adversarial:
        heads = dict(method.discriminator.named_parameters())
        updates = config.discriminator_updates
        rate = config.discriminator_lr
        phases.append(Phase("discriminator", method.discriminator_loss, heads, rate, updates, method.rate_of))
    return phases


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """Copy values by name. Raises ValueError when names or shapes differ."""
    wrong = sorted(n for n in targets.keys() ^ sources.keys()) or [
        n for n in targets if targets[n].shape != sources[n].shape
    ]
    if wrong:
        raise ValueError(f"the weights are of another model: {wrong[0]} is missing or has another shape")
    for name, target in targets.items():
        target.copy_(sources[name])


def train(run: Run) -> Iterator[Event]:
    """Train to ``run.config.steps``, yielding an `Event` a step; resumes by itself from the run's checkpoint.

    Closing the generator (``break``, an exception, a cancel) or any error writes a checkpoint of the last complete
    step; an error between the updates of one step cannot, and leaves the checkpoint before it.
    Raises ValueError before the first step for a dataset or setting that cannot work, FloatingPointError for a
    loss that is not finite, before it can touch the weights.
    """
    micro = run.config.batch_size // (run.processes.num_processes if run.processes else 1)
    run.method.check(run.batch(0)[0], micro)
    run.resume()
    saved = run.step
    try:
        while run.step < run.config.steps:
            logs = training_step(run)
            run.step, run.between_steps = run.step + 1, True
            if run.step % run.config.checkpoint_every == 0 or run.step == run.config.steps:
                run.save()
                saved = run.step
            yield Event(run.step, run.config.steps, logs)
    finally:
        if run.step > saved and run.between_steps:
            run.save()


def training_step(run: Run) -> dict[str, float]:
    """All phases on the micro-batches of one step, then every optimiser, then the moving average."""
    config = run.config
    logs: dict[str, list[float]] = defaultdict(list)
    steps = []
    for micro in range(config.accumulation):
        batch, random = run.batch(micro)
        with autocast(run):
            step = run.method.start(batch, random, run.step)
        for phase in run.phases:
            accumulate(run, phase, step, logs)
        steps.append(step)
    for phase in run.phases:
        finish_gradient(run, phase, logs)
    run.between_steps = False
    for phase in run.phases:
        update(run, phase)
    for phase in run.phases:
        for _ in range(phase.updates - 1):
            for step in steps:
                step.redraw()
                accumulate(run, phase, step, logs)
            finish_gradient(run, phase, logs)
            update(run, phase)
    average = min(config.ema_decay, (1 + run.step) / (10 + run.step))
    for name, value in run.student_parameters.items():
        run.ema[name].lerp_(value.detach(), 1 - average)
    return {name: sum(values) / len(values) for name, values in logs.items()} | {"rate": config.rate(run.step)}


def accumulate(run: Run, phase: Phase, step, logs: dict[str, list[float]]) -> None:
    """Add one micro-batch's gradient to the phase's parameters, and to no others."""
    with autocast(run):
        loss, values = phase.loss(step)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"the {phase.name} loss is not finite at step {run.step + 1} ({values}); the weights before it are kept. "
            "Lower the learning rate, or add r1 if the discriminator's loss had fallen to 0"
        )
    (loss / run.config.accumulation).backward(inputs=list(phase.parameters.values()))
    for name, value in values.items():
        logs[name].append(value)


def finish_gradient(run: Run, phase: Phase, logs: dict[str, list[float]]) -> None:
    """Average over the processes and clip. Raises FloatingPointError for a gradient that is not finite."""
    parameters = [p for p in phase.parameters.values() if p.grad is not None]
    if run.processes and run.processes.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        flat = run.processes.reduce(flat, reduction="mean")
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
    norm = nn.utils.clip_grad_norm_(parameters, run.config.gradient_clip).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the {phase.name} gradient is not finite at step {run.step + 1}; the weights before it are kept. "
            "Lower the learning rate"
        )
    logs[f"{phase.name}_grad_norm"].append(norm)


def update(run: Run, phase: Phase) -> None:
    optimizer = run.optimizers[phase.name]
    for group in optimizer.param_groups:
        group["lr"] = phase.lr * group["factor"] * run.config.rate(run.step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def autocast(run: Run):
    """Mixed precision where the device has it."""
    kind = run.device.type
    wanted = run.config.precision
    if wanted == "auto":
        wanted = "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(kind, torch.bfloat16, enabled=wanted == "bfloat16")
