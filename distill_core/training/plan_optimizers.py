"""The optimizers of a planned step: torch's own step on tensors without data, others are as many bytes of state."""

from __future__ import annotations

import torch

from .loop import Run, rounding
from .loop_config import TrainConfig
from .optimizers import in_float32

# Bytes of state for each weight, of the optimizers whose packages cannot step without data.
STATE_BYTES = {"adamw8bit": 2.0, "adafactor": 0.1, "prodigy": 16.0, "schedulefree": 8.0}


class StandIn(torch.optim.Optimizer):
    """An optimizer that only has its state: so many bytes for each weight."""

    def __init__(self, groups: list[dict], each: float) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.each = each

    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    size = max(1, int(parameter.numel() * self.each))
                    self.state[parameter]["state"] = torch.zeros(size, dtype=torch.uint8)


def own_optimizers(run: Run, train: TrainConfig, card: bool) -> None:
    """The optimizers of the config, or what stands for them; on a card as torch's own defaults are there."""
    for player in run.players:
        name = train.optimizer_of(player is run.players[0])
        optimizer = run.optimizers[player.name]
        if name in STATE_BYTES:
            run.optimizers[player.name] = StandIn(player.groups(), STATE_BYTES[name])
        elif card:
            for group in optimizer.param_groups:
                group["foreach"] = True  # torch's choice on a GPU, with a temporary copy of all weights


def give_state(run: Run) -> None:
    """The optimizers' state, as after a first step."""
    for player in run.players:
        for parameter in player.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        with in_float32(player.parameters.values(), rounding(run)):
            run.optimizers[player.name].step()
        run.optimizers[player.name].zero_grad(set_to_none=True)
