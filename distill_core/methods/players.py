"""The sides of the game that training is: the student, and who judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]  # a scalar, and scalars to log, which stay on the device until all are read


class PlayerSettings(Protocol):
    """What the loop's settings (`training.loop.TrainConfig`) say of the players."""

    @property
    def student_lr(self) -> float: ...
    @property
    def discriminator_lr(self) -> float: ...
    @property
    def discriminator_updates(self) -> int: ...


def no_scale(name: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Player:
    """One side of the game that training is: what it minimises, with which parameters, and its optimiser's settings.

    loss: of a step -> (scalar, values to log), None where the batch has nothing for it.  updates: optimiser
    steps a training step; those after the first see fresh noise (`base.StudentStep.redraw`). The student has one: the
    others reuse its output.  lr_scale: factor on ``lr`` by parameter name.  buffers: state kept beside the weights,
    e.g. of spectral norms; it goes into the checkpoint.  optimizer: settings of AdamW that differ from the loop's
    (betas, eps, weight_decay).  begins_as_teacher: whether what it computes is the teacher's at first, so that a
    gradient taken from the difference is 0 then.
    """

    name: str
    loss: Callable[[Any], Loss | None]
    parameters: dict[str, torch.nn.Parameter]
    lr: float
    updates: int = 1
    lr_scale: Callable[[str], float] = no_scale
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    begins_as_teacher: bool = False

    def groups(self) -> list[dict]:
        """Optimiser groups in the order of the parameters, one for each run of equal factors."""
        runs = groupby(self.parameters.items(), key=lambda item: self.lr_scale(item[0]))
        return [{"params": [value for _, value in items], "lr_scale": scale} for scale, items in runs]
