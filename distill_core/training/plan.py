"""Will it fit: the memory of a training step, from the very step on tensors without data (`ledger`).

A plan costs seconds of one CPU core and no memory to speak of, whatever the model's size. It counts every tensor of a
step after the first, when the optimizers have their state. What it cannot count (the CUDA context, workspaces of
kernels, gaps in the allocator) is `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data.dataset import Batch, LatentDataset
from ..data.epochs import BatchSize, items_in
from ..methods.base import Distance
from ..methods.components import Components
from ..methods.players import Player
from ..models.denoiser import Backend, Cond
from ..models.offload import FILE, NONE, RAM
from ..models.precision import halves_to_bfloat16
from .ledger import CardAutocast, Ledger
from .loop import Run, training_step
from .optimizers import ADAMW
from .plan_optimizers import give_state, own_optimizers
from .run import RunConfig, assemble

GIB = 2**30
CONTEXT = int(1.2 * GIB)
INPUTS = "inputs"
LASTING = ("model", "student", "average", "optimizer", "discriminator", "fake_score")


@dataclass(frozen=True)
class Shapes:
    """What stands for the dataset: the sizes of a batch's tensors.

    latent: [C, H, W].  cond: one row of conditioning, whose values do not matter.  states: how many states of the
    teacher's path an item keeps.  guidance: of the teacher.  beside: one row of each per-item tensor that is learnt
    from.
    """

    latent: tuple[int, int, int]
    cond: Cond
    state_sigmas: tuple[float, ...] = ()
    guidance: float = 1.0
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [self.latent]

    def manifest(self) -> dict[str, Any]:
        return {"guidance": self.guidance}

    def uncond(self) -> Cond:
        return self.cond

    def batch(self, number: int, size: BatchSize, seed: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """A batch of that size, of noise."""
        count = items_in(size, self.latent) // part[1]
        repeated = lambda value: value.expand(count, *value.shape[1:]).clone()  # noqa: E731
        cond, beside = self.cond.map(repeated), {name: repeated(value) for name, value in self.beside.items()}
        states = torch.randn(count, len(self.state_sigmas), *self.latent) if self.state_sigmas else None
        return Batch(torch.randn(count, *self.latent), cond, states, self.state_sigmas, beside=beside)


@dataclass(frozen=True)
class Plan:
    """The memory of a step, in bytes.

    peak: the most at once.  parts: what was alive then, by what it is for (a phase where it is of that phase alone).
    phases: the most in each phase.  steady: what stays between two steps.  card: whether it is that of a GPU.
    away: of the frozen weights, what is in the blocks, and can be offloaded.  block: the largest of them.
    forwards: of whole frozen networks (another teacher is one more) in a step, those of gradient checkpointing among
    them; with_gradient: of these, such as keep a graph.  moved: what comes to the device in a step if the blocks are
    offloaded.  kept: what `offload_activations` brings to the host in a step, and back.
    """

    peak: int
    parts: dict[str, int]
    phases: dict[str, int]
    steady: int
    card: bool
    away: int = 0
    block: int = 0
    forwards: float = 0.0
    with_gradient: float = 0.0
    moved: int = 0
    kept: int = 0

    @property
    def needed(self) -> int:
        """Free memory that a run needs."""
        return self.peak + (CONTEXT if self.card else 0)

    def said(self) -> str:
        """The plan as lines of text."""
        total = f"a step needs {spell(self.needed)}"
        if self.card:
            total += f": {spell(self.peak)} for tensors, about {spell(CONTEXT)} for CUDA itself"
        lines = [f"{total}; {spell(self.steady)} stay between steps", "at the peak:"]
        for what, size in sorted(self.parts.items(), key=lambda part: -part[1]):
            if size >= 0.005 * self.peak:
                lines.append(f"  {spell(size):>9}  {WORDS.get(what, what)}")
        lines += ["the most in each phase:"]
        lines += [f"  {spell(size):>9}  {phase}" for phase, size in self.phases.items()]
        if self.forwards:
            lines += [f"the frozen network runs {self.forwards:.1f} times a step"]
        return "\n".join(lines)


WORDS = {
    "model": "the model's weights",
    "student": "the student's weights",
    "average": "their moving average",
    "optimizer": "the optimizers' state",
    "gradients": "gradients of the weights",
    "discriminator": "the discriminator's weights",
    "fake_score": "the fake score's weights",
    INPUTS: "inputs of checkpointed blocks",
}


def spell(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 2 else f"{size / 2**20:.0f} MiB"


def plan_step(
    config: RunConfig,
    make: Callable[[FakeTensorMode], Components],
    shapes: Shapes | LatentDataset,
    card: bool = True,
    distance: Callable[[FakeTensorMode], Distance | None] = lambda mode: None,
    watch: Callable[[Ledger, Run], AbstractContextManager] = lambda ledger, run: nullcontext(),
) -> Plan:
    """The memory of one step of the run that ``config`` describes.

    make: the components, with networks whose weights have no data (`ledger.without_data`).  card: as on a GPU
    (bfloat16 where precision is "auto"), else as on this CPU.  distance: that of the pairs and consistency terms.
    watch: what the step is run inside of.
    """
    train = config.train
    precision = "bfloat16" if card and train.precision == "auto" else train.precision
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(mode)
    kept: list[int] = []
    components = make(mode)
    train = replace(train, compile=False)
    usual = replace(train, optimizer=ADAMW, discriminator_optimizer=ADAMW, precision=precision, validation=0)
    lora = replace(config.student.lora, start_from="", adapter="")
    config = replace(config, train=usual, student=replace(config.student, lora=lora))
    with ExitStack() as stack:
        if card:
            stack.enter_context(CardAutocast())
        offloads = []
        for backend in components.backends:
            if card:
                backend.switch.around_recompute = CardAutocast
            if precision == "bfloat16":
                halves_to_bfloat16(backend.network)
            # The blocks are watched in any case, for what an offload would move.
            offloads.append(offload := backend.offload("cpu", RAM, copies=card and train.offload != NONE))
            if train.offload == FILE or offload.copies:
                ledger.leave_out(offload.weights())
        stack.enter_context(ledger)
        run = assemble(config, components, shapes, distance=distance(mode))  # type: ignore[arg-type]  # what a step asks of a dataset
        own_optimizers(run, train, card)
        if card and train.ema_in_ram:
            ledger.leave_out(run.ema.values())
        for backend in components.backends:
            if card and train.offload_activations:
                backend.switch.keep_inputs = partial(_kept, ledger)
            backend.switch.before_checkpoint = partial(_note_inputs, ledger, kept)
        with watch(ledger, run):
            counted_step(ledger, run)
    steady = sum(ledger.now[what] for what in LASTING)
    return Plan(
        ledger.peak,
        {k: v for k, v in ledger.at_peak.items() if v},
        _in_order(ledger.by_phase),
        steady,
        card,
        sum(offload.size for offload in offloads),
        max(offload.largest for offload in offloads),
        sum(offload.runs / len(offload.homes) for offload in offloads),
        sum(offload.with_gradient / len(offload.homes) for offload in offloads),
        sum(offload.moved for offload in offloads),
        sum(kept),
    )


def _note_inputs(ledger: Ledger, sizes: list[int], inputs: tuple) -> None:
    """What `offload_activations` keeps, or would keep, of a block's inputs."""
    away = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    sizes += [value.numel() * value.element_size() for value in away]
    ledger.assign(away, INPUTS)


def _kept(ledger: Ledger, value: Tensor) -> Tensor:
    """An input of a block in host memory, which is not counted there."""
    kept = value.clone()
    ledger.leave_out([kept])
    return kept


def counted_step(ledger: Ledger, run: Run) -> None:
    """One training step as it is after the first, inside the ledger; its peak is then the step's."""
    _label(ledger, run)
    with _phases(ledger, run):
        give_state(run)
        _label(ledger, run)
        ledger.forget_peak()
        for backend in frozen_backends(run):
            if (offload := backend.offloaded) is not None:
                offload.runs = offload.with_gradient = offload.moved = 0
        training_step(run)
    _label(ledger, run)  # a LoRA in bfloat16 has other tensors now


def _in_order(phases: Mapping[str, int]) -> dict[str, int]:
    return {phase: size for phase, size in phases.items() if phase != "setup"}


def frozen_backends(run: Run) -> list[Backend]:
    """The model's, and that of a teacher that is another network."""
    model, teacher = run.method.student.base, run.method.teacher.backend
    return [model] if teacher is model else [model, teacher]


def _label(ledger: Ledger, run: Run) -> None:
    networks = [backend.network for backend in (*frozen_backends(run), run.method.student.backend)]
    if (lora := run.method.teacher.lora) is not None:
        ledger.assign(lora.parameters(), "model")
    ledger.assign([t for network in networks for t in (*network.parameters(), *network.buffers())], "model")
    for player in run.players[1:]:
        what = player.name if player.name in LASTING else "discriminator"
        ledger.assign([*player.parameters.values(), *player.buffers.values()], what)
    ledger.assign(run.student_parameters.values(), "student")
    ledger.assign(run.ema.values(), "average")
    for optimizer in run.optimizers.values():
        states = [value for state in optimizer.state.values() for value in state.values()]
        ledger.assign([value for value in states if isinstance(value, Tensor)], "optimizer")


@contextmanager
def _phases(ledger: Ledger, run: Run) -> Iterator[None]:
    """The ledger's phases follow the loop."""
    method, handles = run.method, []
    start = method.start

    def started(*args):
        with ledger.during("the student's forward"):
            return start(*args)

    method.start = started  # type: ignore[method-assign]
    for index, player in enumerate(run.players):
        run.players[index] = replace(player, loss=_phased(ledger, player))
        optimizer = run.optimizers[player.name]
        optimizer.step = _in_phase(ledger, f"the {player.name}'s update", optimizer.step)  # type: ignore[method-assign]
        for parameter in player.parameters.values():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(_note_gradient, ledger)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_gradient(ledger: Ledger, parameter: Tensor) -> None:
    if parameter.grad is not None:
        ledger.assign([parameter.grad], "gradients")


def _phased(ledger: Ledger, player: Player) -> Callable:
    def loss(step):
        with ledger.during(f"the {player.name}'s loss"):
            result = player.loss(step)
        ledger.phase = f"the {player.name}'s backward"
        return result

    return loss


def _in_phase(ledger: Ledger, phase: str, function: Callable) -> Callable:
    def call(*args, **kwargs):
        with ledger.during(phase):
            return function(*args, **kwargs)

    return call
