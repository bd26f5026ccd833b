"""The one training loop. ``for event in train(run): ...`` - leaving the loop at any event keeps a checkpoint.

A step computes each player's loss (`methods.base.Player`) once per micro-batch and then lets every optimiser step, so
the discriminator reuses the features the student's loss has just computed. All randomness comes from (seed, item
number): a resumed run, or one on several processes, draws what one uninterrupted process would.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from ..data.dataset import LatentDataset
from ..data.held_out import hold_out
from ..diffusion.noise import ItemNoise, item_generator
from ..methods.base import StudentMethod
from ..methods.players import Player
from ..models.denoiser import without_captions
from ..settings import decisive
from . import checkpoints
from .checkpoints import copy_into
from .figures import Figures
from .loop_config import TrainConfig
from .optimizers import averaged, in_float32, new_optimizer
from .sharded import Parts, check_sharded


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
        self.method, self.config, self.accelerator = method, config, accelerator
        self.dataset, self.held_out = hold_out(dataset, config.validation, config.seed)
        self.folder = Path(folder) if folder else None
        self.description = description or {}
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        if config.shard:
            check_sharded(config, method.student.lora is not None, world)
        self.parts = Parts(method.players(config), accelerator) if config.shard else None  # of weights shared out
        self.players = self.parts.players if self.parts else method.players(config)
        if self.players[0].updates != 1:
            raise ValueError("the first player is the student: it has one update a step, whose output the others reuse")
        self.optimizers = {
            player.name: new_optimizer(
                config.optimizer_of(player is self.players[0]),
                player.groups(),
                player.lr,
                {"betas": config.betas, "eps": 1e-8, "weight_decay": config.weight_decay, **player.optimizer},
            )
            for player in self.players
        }
        place = torch.device("cpu") if config.ema_in_ram else self.device
        self.ema = {
            name: value.detach().to(place, torch.float32, copy=True) for name, value in self.student_parameters.items()
        }
        self.uncond = dataset.uncond() if config.caption_dropout else None
        self.step = 0
        self.between_steps = True  # False while a step has updated some of the weights and not yet all
        self.batch_size, self.part = config.batches(method.student.backend.limits(), world), (rank, world)
        whole = self.batch_size  # items of a batch, which are fewer where latents are large
        sizes = {whole} if isinstance(whole, int) else {whole.of(*shape[1:]) for shape in self.dataset.shapes}
        self.largest, self.smallest_share = max(sizes), min(sizes) // world
        self.is_main = rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.accelerator is None or self.accelerator.num_processes == 1

    @property
    def student_parameters(self) -> dict[str, nn.Parameter]:
        return self.players[0].parameters

    @property
    def device(self) -> torch.device:
        return next(iter(self.student_parameters.values())).device

    @property
    def checkpoint(self) -> Path | None:
        """The file that this process writes at this step, None for none."""
        return checkpoints.path_to_write(self)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The student as it is used, with its averaged weights and no training adapter, for sampling and saving; what
        is trained comes back afterwards."""
        trained = {
            name: value.detach().to(self.ema[name].device, copy=True) for name, value in self.student_parameters.items()
        }
        lora = self.method.student.lora
        over = lora.over if lora else ()
        copy_into(self.student_parameters, self.ema)
        if lora:
            lora.over = ()
        try:
            yield
        finally:
            copy_into(self.student_parameters, trained)
            if lora:
                lora.over = over

    def batch(self, micro: int):
        """Micro-batch ``micro`` of the current step and the randomness of its items."""
        config = self.config
        number = self.step * config.accumulation + micro
        batch = self.dataset.batch(number, self.batch_size, config.seed, self.part)
        # Items have numbers of their own, with gaps after batches that are smaller than the largest.
        count = len(batch.latents)
        first = number * self.largest + self.part[0] * count
        random = ItemNoise(config.seed, range(first, first + count))
        if config.caption_dropout:
            dropped = random.named("caption").uniform() < config.caption_dropout
            batch = replace(batch, cond=without_captions(batch.cond, self.uncond, dropped))
        return batch.to(self.device), random

    def save(self) -> None:
        """Write the checkpoint: trained weights, average, optimisers, position and settings."""
        checkpoints.save(self)

    def settings(self) -> dict:
        """What must agree between a checkpoint and the run that goes on from it (a run may be made longer)."""
        return json.loads(json.dumps({**decisive(self.config), **self.description}))

    def resume(self) -> bool:
        """Go on from the checkpoint if there is one. Raises ValueError for one that is damaged or of another run."""
        return checkpoints.resume(self)


def train(run: Run, listeners: Sequence[Listener] = ()) -> Generator[Event]:
    """Train to ``run.config.steps``, yielding an `Event` a step; resumes by itself from the run's checkpoint.

    listeners: called with each event before it is yielded; one that raises ends the run.
    Closing the generator (``break``, an exception, a cancel) or any error writes a checkpoint of the last complete
    step; an error between the updates of one step cannot, and leaves the checkpoint before it.
    Raises ValueError before the first step for a dataset or setting that cannot work, FloatingPointError for a
    loss that is not finite, before it can touch the weights.
    """
    run.method.check(run.batch(0)[0], run.smallest_share)
    if run.step == 0:  # who needs to know where it goes on has resumed it
        run.resume()
    saved = run.step
    try:
        while run.step < run.config.steps:
            logs = training_step(run)
            run.step, run.between_steps = run.step + 1, True
            event = Event(run.step, run.config.steps, logs)
            for listener in listeners:
                listener(event)
            yield event
            # Only now, when the step is in the log: a process that is killed before does it again.
            if run.step % run.config.checkpoint_every == 0 or run.step == run.config.steps:
                run.save()
                saved = run.step
    finally:
        if run.step != saved and run.between_steps:  # a listener may have put back an earlier step
            run.save()


def training_step(run: Run) -> dict[str, float]:
    """All players on the micro-batches of one step, then every optimiser, then the moving average."""
    config, figures = run.config, Figures()
    steps, playing = [], set()  # who has learnt something: of a mix, some batches have nothing for the discriminator
    again = any(player.updates > 1 for player in run.players)
    # Gradients of all players on the same forwards: the student's graph is alive for its own loss only.
    for micro in range(config.accumulation):
        batch, random = run.batch(micro)
        with autocast(run):
            step = run.method.start(batch, random, run.step)
        for player in run.players:
            if accumulate(run, player, step, figures):
                playing.add(player.name)
        if again:
            step.release()
            steps.append(step)
        del step  # or it would stay until the next micro-batch has been computed
    players = [player for player in run.players if player.name in playing]
    for player in players:
        finish_gradient(run, player, figures)
    read_figures(run, figures)
    # From here weights change, so a crash before the end of the step cannot be saved.
    run.between_steps = False
    for player in players:
        update(run, player)
    # More updates of those who want them, on the same student outputs with fresh noise.
    for player in players:
        for _ in range(player.updates - 1):
            for step in steps:
                step.redraw()
                accumulate(run, player, step, figures)
                step.release()
            finish_gradient(run, player, figures)
            read_figures(run, figures)
            update(run, player)
    # The average forgets its first steps faster, while the student is still far from where it goes.
    average = min(config.ema_decay, (1 + run.step) / (config.ema_ramp + run.step))
    for name, value in run.student_parameters.items():
        now = averaged(run.optimizers[run.players[0].name], value)
        run.ema[name].lerp_(now.to(run.ema[name]), 1 - average)
    return mean_logs(run, figures.logs) | {"rate": config.lr_scale(run.step, config.optimizer)}


def mean_logs(run: Run, logs: Mapping[str, list[float]]) -> dict[str, float]:
    """The means of what each micro-batch of each process had to say; all processes get the same."""
    every = dict(logs)
    if not run.alone:
        from accelerate.utils import gather_object

        parts = gather_object([every])
        every = {name: [v for part in parts for v in part.get(name, ())] for part in parts for name in part}
    return {name: sum(values) / len(values) for name, values in every.items()}


def accumulate(run: Run, player: Player, step, figures: Figures) -> bool:
    """Add one micro-batch's gradient to the player's parameters, and to no others; False where it has nothing to learn
    from this batch."""
    with run.parts.only(player) if run.parts else nullcontext():
        with autocast(run):
            found = player.loss(step)
        if found is None:
            return False
        loss, values = found
        figures.require_finite(f"{player.name} loss", loss)
        figures.add(values)
        if not run.alone:  # so that the averaged gradient ends all processes, which would wait for this one
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        loss = loss / run.config.accumulation
        if run.parts and run.parts.of(player):
            run.parts.backward(loss)
        else:
            loss.backward(inputs=list(player.parameters.values()))
    return True


def finish_gradient(run: Run, player: Player, figures: Figures) -> None:
    """Average over the processes and clip.

    A few parameters may have none: layers behind the last block that a discriminator reads, or of the text in a
    transformer's last block. Raises ValueError when half of them have none.
    """
    parameters = [p for p in player.parameters.values() if p.grad is not None]
    unreached = [name for name, p in player.parameters.items() if p.grad is None]
    if len(unreached) >= len(parameters):
        raise ValueError(
            f"{len(unreached)} of the {player.name}'s {len(player.parameters)} trained tensors get no gradient "
            f"({', '.join(unreached[:3])}): the loss does not depend on them. Set precision = 'float32', or use torch "
            "2.10 or newer"
        )
    longest = run.config.gradient_clip or math.inf
    if run.parts and run.parts.of(player):
        norm = run.parts.clip(parameters, longest)
    else:
        if not run.alone:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            flat = run.accelerator.reduce(flat, reduction="mean")
            for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = grad.view_as(p)
        norm = nn.utils.clip_grad_norm_(parameters, longest)
    figures.require_finite(f"{player.name} gradient", norm)
    figures.add({f"{player.name}_grad_norm": norm})


def read_figures(run: Run, figures: Figures) -> None:
    """The step's one look at the device. Raises FloatingPointError for a loss or a gradient that is not finite."""
    for name in figures.read():
        for optimizer in run.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        values, more = "", ""
        if name.endswith("loss"):
            values, more = f" ({figures.latest()})", ", or raise r1 if the discriminator's loss had fallen to 0"
        raise FloatingPointError(
            f"the {name} is not finite at step {run.step + 1}{values}; the weights before it are kept. "
            f"Lower student_lr or discriminator_lr{more}"
        )


def update(run: Run, player: Player) -> None:
    optimizer, name = run.optimizers[player.name], run.config.optimizer_of(player is run.players[0])
    for group in optimizer.param_groups:
        group["lr"] = player.lr * group["lr_scale"] * run.config.lr_scale(run.step, name)
    with in_float32(player.parameters.values(), rounding(run)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def rounding(run: Run) -> torch.Generator:
    """What weights in bfloat16 are rounded by at this step."""
    seed = item_generator(run.config.seed, run.step, zlib.crc32(b"rounding")).initial_seed()
    return torch.Generator(run.device).manual_seed(seed)


def autocast(run: Run):
    """Mixed precision where the device has it."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.mixed(run.device))
