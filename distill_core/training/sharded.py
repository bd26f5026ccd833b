"""Trained weights that are shared out among processes (`models.sharding`), as the training loop sees them.

Each is the part that this process has, a plain tensor in the same memory. So optimizers, the average, checkpoints and
snapshots are what they are for weights that are whole. What is not: a backward, whose gradients torch gives to the
weights that are shared out, and the norm of a gradient, which has parts in all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.players import Player
from ..models.offload import NONE
from ..models.sharding import is_shared, part
from .loop_config import TrainConfig

ELEMENTWISE = ("adamw", "adamw8bit", "schedulefree")  # optimizers to which each weight is alone


class Parts:
    """This process's parts of the players' weights.

    players: with the parts as their parameters.  rank, world: of this process, and their number.
    Raises ValueError where nothing is shared out, or more than the student is.
    """

    def __init__(self, players: Sequence[Player], accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.owners: dict[nn.Parameter, nn.Parameter] = {}  # of a part: the weight that is shared out
        self.players = [self._with_parts(player) for player in players]
        student, *others = ([is_shared(p) for p in player.parameters.values()] for player in players)
        if not all(student):
            raise ValueError("shard: the model's weights are not shared out yet (`backend.share_out`)")
        if any(map(any, others)):
            raise ValueError(
                'shard: a second network under the discriminator cannot be trained with it: set critic = "lora" in '
                "[diffusion2gan], or shard = false"
            )

    def _with_parts(self, player: Player) -> Player:
        parameters = {}
        for name, weight in player.parameters.items():
            parameters[name] = weight
            if is_shared(weight):
                parameters[name] = nn.Parameter(part(weight))
                self.owners[parameters[name]] = weight
        return replace(player, parameters=parameters)

    def of(self, player: Player) -> bool:
        """Whether a player's weights are shared out."""
        return any(p in self.owners for p in player.parameters.values())

    @contextmanager
    def only(self, player: Player) -> Iterator[None]:
        """While a player whose weights are shared out takes its loss and gradient, the others' weights ask for none."""
        others = [p for other in self.players if other.name != player.name for p in other.parameters.values()]
        frozen = [p for p in others if p.requires_grad and p not in self.owners] if self.of(player) else []
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient's parts, averaged over the processes, to those of the weights."""
        loss.backward()
        for mine, owner in self.owners.items():
            if owner.grad is not None:
                gradient, owner.grad = part(owner.grad), None
                mine.grad = gradient if mine.grad is None else mine.grad + gradient

    def clip(self, parameters: Sequence[nn.Parameter], longest: float) -> Tensor:
        """The norm of a gradient that is shared out, which is scaled down to ``longest`` at most."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = self.accelerator.reduce(norm.square(), reduction="sum").sqrt()
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
        return norm

    def all_agree(self, yes: bool) -> bool:
        """Whether all processes say so; all must ask."""
        mine = torch.tensor(float(yes), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, reduction="sum") == self.world)


def check_sharded(config: TrainConfig, lora: bool, processes: int) -> None:
    """Refuse what ``shard`` cannot do. Raises ValueError."""
    if processes == 1:
        raise ValueError(
            "shard = true shares the weights out among several processes, and there is one: start several by "
            "accelerate launch --num_processes N (on CPUs torchrun --nproc_per_node N), or set shard = false"
        )
    if lora:
        raise ValueError(
            "shard = true is for training all weights: a LoRA is small, and each process has the model whole beside "
            "it. Set lora_rank = 0, or shard = false"
        )
    if config.offload != NONE or config.offload_activations:
        name = "offload" if config.offload != NONE else "offload_activations"
        raise ValueError(f"{name} and shard cannot be used together: set one of them to its default")
    if config.optimizer not in ELEMENTWISE:
        raise ValueError(
            f"optimizer = {config.optimizer!r} looks at many weights at once, and with shard = true no process has "
            f"them: choose one of {', '.join(ELEMENTWISE)}"
        )
