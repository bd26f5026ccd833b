"""How tensors of the CPU come to a device without anybody waiting.

A copy to a GPU from ordinary memory holds up the CPU until it is done, and a GPU whose CPU waits soon has nothing to
do. From page-locked memory it does not: torch keeps that memory until the copy has read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in ``dtype`` where one is given; one of the CPU is sent by a copy that nobody waits for."""
    device = torch.device(device)
    value = value if dtype is None else value.to(dtype)
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.contiguous().pin_memory()
    return value.to(device, non_blocking=True)


def like(value: Tensor, other: Tensor) -> Tensor:
    """A tensor with the device and the dtype of another one."""
    return upload(value, other.device, other.dtype)


def pick(value: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows ``rows`` of a tensor; itself where these are all of them, in order."""
    if list(rows) == list(range(len(value))):
        return value
    return value.index_select(0, upload(torch.tensor(rows, dtype=torch.long), value.device))


def put(value: Tensor, rows: Sequence[int], part: Tensor) -> Tensor:
    """The tensor with ``part`` in the place of its rows ``rows``."""
    return value.index_copy(0, upload(torch.tensor(rows, dtype=torch.long), value.device), part)


class Table:
    """A tensor of the CPU that never changes, sent to each device once."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.copies: dict[tuple, Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The values on a device."""
        key = device, dtype or self.values.dtype
        if key == (self.values.device, self.values.dtype):
            return self.values
        if key not in self.copies:
            self.copies[key] = upload(self.values, *key)
        return self.copies[key]
