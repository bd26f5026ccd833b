"""What a step computes to be told: losses, norms and health. They stay on the device until all are read at once.

To read one value of a GPU is to wait until it has done everything it was asked for, and then to leave it idle until it
is asked again. So a step reads once for each time that optimizers step: after the gradients, before any weight changes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


class Figures:
    """Collects scalars by name, and those that must be finite; `read` makes numbers of all that came since the last.

    logs: every value of a name in the order it came, one a micro-batch.
    """

    def __init__(self) -> None:
        self.logs: dict[str, list[float]] = defaultdict(list)
        self._waiting: list[tuple[str, Tensor, bool]] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        self._waiting += [(name, value.detach(), False) for name, value in values.items()]

    def require_finite(self, name: str, value: Tensor) -> None:
        """Ask `read` to look at a value that is not logged."""
        self._waiting.append((name, value.detach(), True))

    def read(self) -> list[str]:
        """Wait for the device once. Returns the names that were to be finite and are not, in the order they came."""
        if not self._waiting:
            return []
        numbers = torch.stack([value for _, value, _ in self._waiting]).tolist()
        bad = []
        for (name, _, checked), number in zip(self._waiting, numbers, strict=True):
            if not checked:
                self.logs[name].append(number)
            elif not math.isfinite(number):
                bad.append(name)
        self._waiting.clear()
        return bad

    def latest(self) -> dict[str, float]:
        return {name: values[-1] for name, values in self.logs.items()}
