"""What several cards would do to a step's memory and time, on paper: by the step without data (`plan`) and bandwidths.

Each card takes the batch that the plan has. With shared weights (`models.sharding`) it keeps a part of what is trained
and of the frozen blocks, and gathers each block once for every forward and once more for a backward through it; the
gradients of all weights are added up and shared out again. Without, the gradients alone are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..methods.components import Components
from ..models.offload import RAM
from .ledger import AWAY, CardAutocast, Ledger
from .loop import Run
from .plan import CONTEXT, LASTING, plan_step
from .run import RunConfig

NODE = 8  # cards that are joined by NVLink
WITHIN, BETWEEN = 450e9, 50e9  # bytes a second and card: NVLink 4 (H100), and one 400 Gbit/s adapter a card
SUSTAINED = 400e12  # operations a second: 40 % of an H100's 989e12 in bfloat16
BEFORE_UPDATES = (
    *("the student's forward", "the generator's loss", "the generator's backward"),
    *("the discriminator's loss", "the fake_score's loss"),
)
GRADIENT, WEIGHT, AVERAGE = 4, 4, 4  # bytes of a weight that is trained in float32


@dataclass(frozen=True)
class Load:
    """What a step has and does on one card, in bytes, as far as the number of cards changes it.

    lasting: all that stays between steps.  frozen: of it, weights in the frozen blocks.  student: of it, what belongs
    to the student's weights, with the average and the optimizer's state.  weights: of the student, their number.
    heads: number of the other trained weights.  work: in each phase, what comes and goes, gradients of weights not.
    block: of the frozen network the largest; student_block: of the student, in weights.
    gathered: what shared weights bring to a card in a step, in the format that is computed in.
    passes: backward passes through the student.  operations: of the step.
    """

    lasting: int
    frozen: int
    student: int
    weights: int
    heads: int
    work: Mapping[str, int]
    block: int
    student_block: int
    gathered: int
    passes: int
    operations: int


@dataclass(frozen=True)
class Cards:
    """A step on ``count`` cards: memory of one (with CUDA's own), bytes that one receives, and seconds."""

    count: int
    needed: int
    received: int
    computing: float
    exchanging: float

    @property
    def slower(self) -> tuple[float, float]:
        """Factors on the time of a step: with the exchange behind the computing, and after it."""
        return max(1.0, self.exchanging / self.computing), 1 + self.exchanging / self.computing


def load_of_step(
    config: RunConfig,
    make: Callable[[FakeTensorMode], Components],
    shapes: Any,
    distance: Callable[[FakeTensorMode], Any] = lambda mode: None,
) -> Load:
    """Runs the step of ``config`` as `plan.plan_step` does, on a GPU in bfloat16: once for memory, once for operations,
    since torch's counter takes attention apart into matrices that no kernel keeps."""
    found: list[Load] = []
    shared = config.train.shard

    def halved(mode: FakeTensorMode) -> Components:
        components = make(mode)
        if shared:  # gathered in bfloat16, so autocast has nothing to cast; what is kept in float32 is added below
            backend, whole_copy = components.backend, components.backend.trainable_copy
            backend.trainable_copy = lambda: _in_halves(whole_copy())
        return components

    @contextmanager
    def watched(ledger: Ledger, run: Run) -> Iterator[None]:
        student = run.method.student
        own = student.backend.offload("cpu", RAM) if student.lora is None else None
        yield
        found.append(_load(ledger, run, own))

    counter = FlopCounterMode(display=False)
    config = replace(config, train=replace(config.train, shard=False))
    plan_step(config, halved, shapes, True, distance, watched)
    plan_step(config, halved, shapes, True, distance, lambda ledger, run: counter)
    return replace(found[0], operations=counter.get_total_flops())


def _in_halves(backend: Any) -> Any:
    for weight in backend.network.parameters():
        weight.data = weight.data.bfloat16()
    backend.switch.around_recompute = CardAutocast
    return backend


def _load(ledger: Ledger, run: Run, own: Any) -> Load:
    teacher: Any = run.method.teacher.backend
    frozen = teacher.offloaded
    again = 1.0 if teacher.gradient_checkpointing else 1 + frozen.with_gradient / max(1, frozen.runs)
    weights = sum(p.numel() for p in run.student_parameters.values())
    state = run.optimizers[run.players[0].name].state
    moments = sum(_bytes(v) for values in state.values() for v in values.values() if isinstance(v, Tensor))
    kept = sum(map(_bytes, run.student_parameters.values())) + sum(map(_bytes, run.ema.values())) + moments
    student_block, gathered = 0, frozen.moved * again
    if own is not None:
        backend: Any = run.method.student.backend
        blocks = [_numel(backend.network.get_submodule(name)) for name in backend.units]
        student_again = 1.0 if backend.gradient_checkpointing else 1 + own.with_gradient / max(1, own.runs)
        student_block, gathered = max(blocks), gathered + 2 * weights * student_again * own.runs / len(blocks)
    return Load(
        sum(ledger.now[what] for what in LASTING),
        frozen.size,
        kept,
        weights,
        sum(p.numel() for player in run.players[1:] for p in player.parameters.values()),
        {phase: _work(parts) for phase, parts in ledger.parts_by_phase.items() if phase != "setup"},
        frozen.largest,
        student_block,
        int(gathered),
        run.config.accumulation,
        0,
    )


def _work(parts: Mapping[str, int]) -> int:
    return sum(size for what, size in parts.items() if what not in (*LASTING, "gradients", AWAY))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_cards(load: Load, count: int, shared: bool, moments: float = 8.0, average: float = AVERAGE) -> Cards:
    """The step on several cards.

    moments, average: bytes of the optimizer's state and of the average for each weight that is shared.
    """
    share = (count - 1) / count  # of what is gathered, added up or shared out, that crosses a card's border
    heads = 2 * share * GRADIENT * load.heads
    if shared:
        each = WEIGHT + average + moments + GRADIENT
        kept: float = load.lasting - load.frozen - load.student + GRADIENT * load.heads
        kept += (load.frozen + each * load.weights) / count
        # Two blocks at a time, and the gradient of one in bfloat16 and, to be added up, in float32.
        ahead = 2 * max(load.block, 2 * load.student_block) + (2 + GRADIENT) * load.student_block
        # Before weights change: the updates were run on weights in bfloat16, with copies that shared ones do not need.
        # What they take is one temporary copy of this card's part.
        work: float = max(load.work.get(phase, 0) for phase in BEFORE_UPDATES) + ahead
        work = max(work, WEIGHT * load.weights / count)
        received = share * (load.gathered + GRADIENT * load.weights * load.passes) + heads
    else:
        kept = load.lasting + GRADIENT * (load.weights + load.heads)
        work = max(load.work.values())
        received = 2 * share * GRADIENT * load.weights + heads
    seconds = received / (WITHIN if count <= NODE else BETWEEN)
    return Cards(count, int(kept + work) + CONTEXT, int(received), load.operations / SUSTAINED, seconds)


def table(load: Load, counts: list[int], shared: bool, batch: int, **bytes_each: Any) -> str:
    """One line for each number of cards, and what is assumed."""
    lines = [
        f"{batch} items on each card, {load.operations / 1e12:.0f} TFLOP a step; "
        + ("weights shared out" if shared else "each card has the whole model"),
        "| cards | GiB a card | GiB received a step | computing | exchange | step takes |",
        "|---|---|---|---|---|---|",
    ]
    for count in counts:
        cards = on_cards(load, count, shared, **bytes_each)
        best, worst = cards.slower
        lines.append(
            f"| {count} | {cards.needed / 2**30:.1f} | {cards.received / 2**30:.2f} | {cards.computing:.2f} s "
            f"| {cards.exchanging:.2f} s | {best:.2f} to {worst:.2f} x |"
        )
    return "\n".join(
        [
            *lines,
            f"assumed: {SUSTAINED / 1e12:.0f} TFLOP/s, {WITHIN / 1e9:.0f} GB/s a card up to {NODE} cards and "
            f"{BETWEEN / 1e9:.0f} GB/s beyond; the exchange behind the computing, or after it. Not measured.",
        ]
    )
