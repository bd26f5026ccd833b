"""The one training loop. ``for event in train(run): ...`` - leaving the loop at any event keeps a checkpoint.

A step computes each player's loss (`methods.base.Player`) once per micro-batch and then lets every optimiser step, so
the discriminator reuses the features the student's loss has just computed. All randomness comes from (seed, item
number): a resumed run, or one on several processes, draws what one uninterrupted process would.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import LatentDataset
from ..diffusion.noise import ItemNoise
from ..files import load_tensors, save_tensors
from ..methods.base import Player, StudentMethod
from ..settings import decisive, setting

PRECISIONS = ("auto", "float32", "bfloat16")
CHECKPOINT_FORMAT = 2  # 1: version 0.1, whose random draws were others


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

    def lr_scale(self, step: int) -> float:
        """The factor on both learning rates at a step."""
        fall = (self.steps - step) / max(1.0, (1 - self.decay_from) * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), fall)


@dataclass(frozen=True)
class Event:
    """What a listener learns after each step: losses, discriminator health, gradient norms, learning rate factor."""

    step: int
    steps: int
    logs: dict[str, float] = field(default_factory=dict)


Listener = Callable[[Event], None]


class Run:
    """The state of one training run: players, optimisers, the student's moving average, the step counter.

    folder: where the checkpoint lies (None keeps nothing).  accelerator: an ``accelerate.Accelerator`` or None.
    description: anything JSON that must agree on resume (`training.run.RunConfig.description`).
    """

    def __init__(
        self,
        method: StudentMethod,
        dataset: LatentDataset,
        config: TrainConfig,
        folder: str | Path | None = None,
        description: dict | None = None,
        accelerator=None,
    ) -> None:
        self.method, self.dataset, self.config, self.accelerator = method, dataset, config, accelerator
        self.folder = Path(folder) if folder else None
        self.description = description or {}
        self.players = method.players(config)
        if self.players[0].updates != 1:
            raise ValueError("the first player is the student: it has one update a step, whose output the others reuse")
        self.optimizers = {
            player.name: torch.optim.AdamW(
                player.groups(),
                player.lr,
                **{"betas": config.betas, "eps": 1e-8, "weight_decay": config.weight_decay, **player.optimizer},
            )
            for player in self.players
        }
        self.ema = {name: value.detach().clone() for name, value in self.student_parameters.items()}
        self.step = 0
        self.between_steps = True  # False while a step has updated some of the weights and not yet all
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        if config.batch_size % world:
            raise ValueError(f"batch_size {config.batch_size} does not divide among {world} processes")
        share = config.batch_size // world
        self.rows = slice(rank * share, (rank + 1) * share)
        self.is_main = rank == 0

    @property
    def student_parameters(self) -> dict[str, nn.Parameter]:
        return self.players[0].parameters

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
        for player in self.players:
            tensors |= {f"buffer.{player.name}.{name}": value for name, value in player.buffers.items()}
            tensors |= {f"{player.name}.{name}": value for name, value in player.parameters.items()}
            bad = [name for name, value in player.parameters.items() if not torch.isfinite(value).all()]
            if bad:
                raise FloatingPointError(
                    f"{player.name} weights are not finite after step {self.step} ({bad[0]}); the last checkpoint stays"
                )
            moments = self.optimizers[player.name].state_dict()["state"]
            for index, name in enumerate(player.parameters):
                values = moments.get(index, {}).items()
                tensors |= {f"optimizer.{player.name}.{name}.{key}": value for key, value in values}
        state = {"format": CHECKPOINT_FORMAT, "step": self.step, "settings": self.settings()}
        save_tensors(self.checkpoint, tensors, {"run": json.dumps(state)})

    def settings(self) -> dict:
        """What must agree between a checkpoint and the run that goes on from it (a run may be made longer)."""
        return json.loads(json.dumps({**decisive(self.config), **self.description}))

    def resume(self) -> bool:
        """Go on from the checkpoint if there is one. Raises ValueError for one that is damaged or of another run."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        tensors, metadata = load_tensors(self.checkpoint)
        if "run" not in metadata:
            raise ValueError(f"{self.checkpoint} is not a training checkpoint of this project")
        state = json.loads(metadata["run"])
        if state.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(
                f"{self.checkpoint} was written by another version of Turbo Distill, whose random draws differ. "
                "Its run cannot go on: choose another output folder or run name, or delete it to start again"
            )
        changed = differences(self.settings(), state["settings"])
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
        for player in self.players:
            copy_into(player.buffers, part(f"buffer.{player.name}."))
            copy_into(player.parameters, part(f"{player.name}."))
            saved: dict[str, dict[str, Tensor]] = defaultdict(dict)  # parameter -> whatever its optimiser keeps of it
            for path, value in part(f"optimizer.{player.name}.").items():
                name, _, key = path.rpartition(".")
                saved[name][key] = value
            optimizer = self.optimizers[player.name]
            state = optimizer.state_dict()
            state["state"] = {i: saved[name] for i, name in enumerate(player.parameters) if name in saved}
            optimizer.load_state_dict(state)


def differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Dotted names of what differs between two JSON values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted(mine.keys() | theirs.keys())
        parts = [differences(mine.get(key), theirs.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
        return [name for part in parts for name in part]
    return [] if mine == theirs else [path]


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy values by name. Raises ValueError when names or shapes differ."""
    wrong = sorted(n for n in targets.keys() ^ sources.keys()) or [
        n for n in targets if targets[n].shape != sources[n].shape
    ]
    if wrong:
        raise ValueError(f"the weights are of another model: {wrong[0]} is missing or has another shape")
    for name, target in targets.items():
        target.copy_(sources[name])


def train(run: Run, listeners: Sequence[Listener] = ()) -> Generator[Event]:
    """Train to ``run.config.steps``, yielding an `Event` a step; resumes by itself from the run's checkpoint.

    listeners: called with each event before it is yielded; one that raises ends the run.
    Closing the generator (``break``, an exception, a cancel) or any error writes a checkpoint of the last complete
    step; an error between the updates of one step cannot, and leaves the checkpoint before it.
    Raises ValueError before the first step for a dataset or setting that cannot work, FloatingPointError for a
    loss that is not finite, before it can touch the weights.
    """
    micro = run.config.batch_size // (run.accelerator.num_processes if run.accelerator else 1)
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
            event = Event(run.step, run.config.steps, logs)
            for listener in listeners:
                listener(event)
            yield event
    finally:
        if run.step > saved and run.between_steps:
            run.save()


def training_step(run: Run) -> dict[str, float]:
    """All players on the micro-batches of one step, then every optimiser, then the moving average."""
    config = run.config
    logs: dict[str, list[float]] = defaultdict(list)
    steps = []
    # Gradients of all players on the same forwards: the student's graph is alive for its own loss only.
    for micro in range(config.accumulation):
        batch, random = run.batch(micro)
        with autocast(run):
            step = run.method.start(batch, random, run.step)
        for player in run.players:
            accumulate(run, player, step, logs)
        steps.append(step)
    for player in run.players:
        finish_gradient(run, player, logs)
    # From here weights change, so a crash before the end of the step cannot be saved.
    run.between_steps = False
    for player in run.players:
        update(run, player)
    # More updates of those who want them, on the same student outputs with fresh noise.
    for player in run.players:
        for _ in range(player.updates - 1):
            for step in steps:
                step.redraw()
                accumulate(run, player, step, logs)
            finish_gradient(run, player, logs)
            update(run, player)
    # The average forgets its first steps faster, while the student is still far from where it goes.
    average = min(config.ema_decay, (1 + run.step) / (10 + run.step))
    for name, value in run.student_parameters.items():
        run.ema[name].lerp_(value.detach(), 1 - average)
    return {name: sum(values) / len(values) for name, values in logs.items()} | {"rate": config.lr_scale(run.step)}


def accumulate(run: Run, player: Player, step, logs: dict[str, list[float]]) -> None:
    """Add one micro-batch's gradient to the player's parameters, and to no others."""
    with autocast(run):
        loss, values = player.loss(step)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"the {player.name} loss is not finite at step {run.step + 1} ({values}); the weights before it are kept. "
            "Lower the learning rate, or add r1 if the discriminator's loss had fallen to 0"
        )
    (loss / run.config.accumulation).backward(inputs=list(player.parameters.values()))
    for name, value in values.items():
        logs[name].append(value)


def finish_gradient(run: Run, player: Player, logs: dict[str, list[float]]) -> None:
    """Average over the processes and clip. Raises FloatingPointError for a gradient that is not finite."""
    parameters = [p for p in player.parameters.values() if p.grad is not None]
    if run.accelerator and run.accelerator.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        flat = run.accelerator.reduce(flat, reduction="mean")
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
    norm = nn.utils.clip_grad_norm_(parameters, run.config.gradient_clip).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the {player.name} gradient is not finite at step {run.step + 1}; the weights before it are kept. "
            "Lower the learning rate"
        )
    logs[f"{player.name}_grad_norm"].append(norm)


def update(run: Run, player: Player) -> None:
    optimizer = run.optimizers[player.name]
    for group in optimizer.param_groups:
        group["lr"] = player.lr * group["lr_scale"] * run.config.lr_scale(run.step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def autocast(run: Run):
    """Mixed precision where the device has it."""
    kind = run.device.type
    wanted = run.config.precision
    if wanted == "auto":
        wanted = "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(kind, torch.bfloat16, enabled=wanted == "bfloat16")
