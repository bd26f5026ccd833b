"""A card imitated on the CPU, to see where a training step would wait for one.

Tensors count as on the card that are put there (`Card.put`) or are made from others there. What makes the
CPU wait is noted: a value that is read, a shape that depends on values (masks, ``nonzero``), and a tensor of the CPU
that meets one of the card, which on a real card would be an error or a copy that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default}


class Card(TorchDispatchMode):
    """waits: how often the CPU would have waited, by what for."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.storages: dict[int, object] = {}  # held, so that none of the addresses is used again
        for tensor in tensors:
            self.put(tensor)

    def put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, Tensor)]
        there = [t for t in tensors if self.has(t)]
        if there and func in READS:
            self.waits[str(func)] += 1
        if there and any(t.ndim and not self.has(t) for t in tensors):
            self.waits[f"{func} with a tensor of the CPU"] += 1
        if func is aten.index.Tensor and any(t.dtype == torch.bool for t in tensors[1:] if self.has(t)):
            self.waits[f"{func} by a mask"] += 1
        result = func(*args, **(kwargs or {}))
        if there and func not in READS:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor):
                    self.put(tensor)
        return result


@contextmanager
def read_as_lists(card: Card) -> Iterator[None]:
    """Also notes ``tolist`` and ``numpy``, which torch does not dispatch on a CPU."""
    originals = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}

    def noting(name):
        def read(self, *args, **kwargs):
            if card.has(self):
                card.waits[name] += 1
            return originals[name](self, *args, **kwargs)

        return read

    for name in originals:
        setattr(Tensor, name, noting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)
