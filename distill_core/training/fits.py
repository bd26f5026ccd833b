"""What to change so that a run fits: estimates from one plan, each change on top of those before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..models.offload import NONE
from .loop_config import TrainConfig
from .plan import CONTEXT, INPUTS, LASTING, Plan, spell

LOWEST_RANK = 16
SMALLEST_BATCH = 2  # of the hinge loss


@dataclass(frozen=True)
class Way:
    """One change of the settings, and about how many bytes a run needs with it and those before it."""

    change: str
    needed: int


def ways(plan: Plan, train: TrainConfig, rank: int, checkpointing: bool, smaller_base: str = "") -> list[Way]:
    """Changes that save memory, those that cost nothing but time first.

    rank: of the student's LoRA, 0 for none.  smaller_base: how to have the model's weights in half as many bytes, in
    words; empty where there is no way.
    """
    parts: dict[str, float] = dict(plan.parts)
    found = []
    changes = [*_changes(plan, train, rank, checkpointing)]
    if smaller_base and rank and train.offload == NONE:  # all weights of it could be trained, but need far more
        changes.append((smaller_base, {"model": 0.5}))
    for change, factors in changes:
        parts = {what: size * _factor(what, factors) for what, size in parts.items()}
        needed = sum(parts.values()) + (CONTEXT if plan.card else 0)
        found.append(Way(change, int(needed)))
    return found


WORK = "work"  # everything that is not of `LASTING`: activations, gradients of them, temporary tensors
OF_WEIGHTS = ("student", "fake_score", "average", "optimizer", "gradients")


def _changes(
    plan: Plan, train: TrainConfig, rank: int, checkpointing: bool
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Each change in words with what it costs, and the factor on each part of the memory."""
    if not checkpointing:
        again = f" ({plan.with_gradient:.1f} forwards more a step)" if plan.forwards else ""
        yield f"gradient_checkpointing on{again}", {WORK: 0.25}  # SDXL and SD3.5 medium: 0.1 to 0.2 of what it was
    batch, accumulation = train.batch_size, train.accumulation
    if train.tokens_per_batch:
        change = f"tokens_per_batch {train.tokens_per_batch // 2} with accumulation {2 * accumulation}"
        yield change, {WORK: 0.5}
    while not train.tokens_per_batch and batch // 2 >= SMALLEST_BATCH:
        batch, accumulation, before = batch // 2, 2 * accumulation, batch
        yield f"batch_size {batch} with accumulation {accumulation}", {WORK: batch / before}
    if plan.card and not train.ema_in_ram:
        yield "ema_in_ram", {"average": 0.0}
    if train.optimizer == "adamw":
        yield "optimizer adamw8bit (Training Settings, or [train])", {"optimizer": 0.25}
    if plan.card and plan.kept and not train.offload_activations:
        # A fifth stays: what a discriminator reads, and the next largest moment (FLUX.1 and Z-Image at 1024 px).
        yield f"offload_activations ({spell(plan.kept)} copied to the host and back a step)", {INPUTS: 0.2}
    if plan.card and plan.away and train.offload == NONE:
        # Three blocks are on the device at once, in a backward.
        left = max(0, plan.parts["model"] - plan.away + 3 * plan.block) / plan.parts["model"]
        moved = plan.moved if checkpointing else plan.moved * (1 + plan.with_gradient / plan.forwards)
        yield f"offload ram ({spell(moved)} copied to the device a step)", {"model": min(1.0, left)}
    while rank // 2 >= LOWEST_RANK:
        rank //= 2
        yield f"rank {rank}", dict.fromkeys(OF_WEIGHTS, 0.5)
    if not rank:
        yield "a LoRA instead of all weights", dict.fromkeys(OF_WEIGHTS, 0.1)


def _factor(what: str, factors: Mapping[str, float]) -> float:
    lasting = what in LASTING or what == "gradients"
    return factors.get(what, 1.0 if lasting else factors.get(WORK, 1.0))


def advice(plan: Plan, found: list[Way], free: int | None = None) -> str:
    """The changes in one line: all of them, or those up to the first with which the run fits into ``free`` bytes."""
    if free is not None:
        fitting = [i for i, way in enumerate(found) if way.needed <= free]
        found = found[: fitting[0] + 1] if fitting else found
    steps = [f"{way.change} -> {spell(way.needed)}" for way in found]
    if not steps:
        return "train smaller pictures, or a model in fewer bits"
    enough = free is None or found[-1].needed <= free
    return "; with ".join(steps) + ("" if enough else "; and then smaller pictures, or a model in fewer bits")


def verdict(plan: Plan, found: list[Way], free: int) -> str | None:
    """What is to be said before the first step where a run does not fit into ``free`` bytes; None where it does."""
    if plan.needed <= free:
        return None
    return (
        f"this run needs about {spell(plan.needed)} and {spell(free)} are free: {advice(plan, found, free)}. "
        "What it needs and why: the command plan, docs/memory.md"
    )
