"""A card imitated on the CPU, to see where a training step would wait for one.

Tensors count as on the card that are put there (`Card.put`), sent there (``to`` a device, a factory with a device) or
made from others there. What makes the CPU wait is noted: a value that is read, a shape that depends on values (masks,
``nonzero``), a copy to the card that is not asked to be `non_blocking`, and a tensor of the CPU that meets one of the
card, which on a real card would be an error or a copy that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default}
DOWNLOADS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}  # torch dispatches none on a CPU
BACKWARDS = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


ENGINE = torch.autograd._engine_run_backward


class Card:
    """waits: how often the CPU would have waited, by what for.  sent: copies to the card.

    Watches while it is entered, backward passes and what is computed again in them, too.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.waits: Counter[str] = Counter()
        self.sent = self.called = 0  # called: functions of torch that are running
        self.storages: dict[int, object] = {}  # held, so that none of the addresses is used again
        for tensor in tensors:
            self.put(tensor)

    def put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def __enter__(self) -> Card:
        self.stack = ExitStack()
        self.stack.enter_context(_Operations(self))
        self.stack.enter_context(_Calls(self))
        self.stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", self._backward))
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def _backward(self, *args, **kwargs):
        """The calls of a backward are noted, too: torch takes the mode off for the call of the backward itself."""
        with _Calls(self):
            return ENGINE(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        card, tensors = self.card, [t for t in tree_iter((args, kwargs or {})) if isinstance(t, Tensor)]
        there = [t for t in tensors if card.has(t)]
        if there and func in READS:
            card.waits[str(func)] += 1
        if there and any(t.ndim and not card.has(t) for t in tensors):
            card.waits[f"{func} with a tensor of the CPU"] += 1
        if func is aten.index.Tensor and any(t.dtype == torch.bool for t in tensors[1:] if card.has(t)):
            card.waits[f"{func} by a mask"] += 1
        result = func(*args, **(kwargs or {}))
        # What a backward itself makes from nothing (zeros, ones) is where the gradients are.
        made = not tensors and torch._C._current_graph_task_id() != -1 and not card.called
        if made or (there and func not in READS):
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor):
                    card.put(tensor)
        return result


class _Calls(TorchFunctionMode):
    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func, types, args=(), kwargs=None):
        card, kwargs = self.card, kwargs or {}
        there = bool(args) and isinstance(args[0], Tensor) and card.has(args[0])
        if there and func in DOWNLOADS:
            card.waits[DOWNLOADS[func]] += 1
        card.called += func not in BACKWARDS
        try:
            result = func(*args, **kwargs)
        finally:
            card.called -= func not in BACKWARDS
        if func is Tensor.to and not there and isinstance(result, Tensor) and _device(args[1:], kwargs) is not None:
            waits = "" if kwargs.get("non_blocking") else "to"
        elif func in FROM_VALUES and (there or kwargs.get("device") is not None):
            waits = func.__name__
        elif kwargs.get("device") is not None and not any(isinstance(a, Tensor) for a in args):
            card.put(result)  # made on the card
            return result
        else:
            return result
        card.sent += 1
        if waits:
            card.waits[f"{waits} that waits"] += 1
        return card.put(result.clone())


def _device(args: tuple, kwargs: dict) -> object:
    """The device that ``Tensor.to`` is asked for, if one."""
    if "device" in kwargs:
        return kwargs["device"]
    first = args[0] if args else kwargs.get("other")
    return first if isinstance(first, (str, torch.device)) else getattr(first, "device", None)
