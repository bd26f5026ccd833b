"""Memory of tensors, counted as they come and go: what is alive, what it is for, and the most there ever was.

It counts real tensors and fake ones alike. Fake ones (``torch._subclasses.FakeTensorMode``) have shapes, formats and
lifetimes but no data, so a step of a network of any size can be counted in seconds and without its memory.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
LARGE = 4096  # elements from which a new tensor is made without data; smaller ones keep theirs, for decisions by value
AWAY = "away"
DEVICE_OF = torch.ops.prim.device.default


class Ledger(TorchDispatchMode):
    """Counts the storages of every tensor that an operation makes while it is entered, in bytes.

    phase: what is being done; a storage is counted for the phase it is made in until `assign` says what it is.
    peak, at_peak: the most bytes alive at once, and for what.  by_phase, parts_by_phase: the most in each phase, and
    for what.
    Not counted: an operation's own scratch memory, what the device's allocator leaves unused, the CUDA context.

    fakes: with it, new tensors of `LARGE` and more elements are made without data, and a value that is asked of one is
    1: a loss is finite, a mask is full.
    """

    def __init__(self, fakes: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.fakes, self.phase = fakes, "setup"
        self.alive: dict[int, tuple[weakref.ref, int, str]] = {}  # of a storage: the reference to it, bytes, what for
        self.now: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.by_phase: dict[str, int] = {}
        self.parts_by_phase: dict[str, dict[str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE_OF:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _a_value(args[0].dtype)
        result = self._run(func, args, kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def _run(self, func, args, kwargs) -> Any:
        if self.fakes is None:
            return func(*args, **kwargs)
        if not any(isinstance(value, Tensor) for value in tree_iter((args, kwargs))) and _size(args) >= LARGE:
            with self.fakes:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def count(self, tensor: Tensor, what: str | None = None) -> None:
        """Count a tensor's storage, if it is not yet, for ``what`` or the phase that is running."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size, what = storage.nbytes(), what or self.phase
        self.alive[key] = (weakref.ref(storage, partial(self._freed, key)), size, what)
        self.now[what] += size
        self.total += size
        if self.total > self.by_phase.get(self.phase, 0):
            self.by_phase[self.phase], self.parts_by_phase[self.phase] = self.total, dict(self.now)
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, dict(self.now)

    def _freed(self, key: int, reference: weakref.ref) -> None:
        _, size, what = self.alive.pop(key)
        self.now[what] -= size
        self.total -= size

    def assign(self, tensors: Iterable[Tensor], what: str) -> None:
        """Say what tensors are, those that were counted for a phase and those made before the ledger was entered."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self.alive.get(storage._cdata)
            if known is None:
                self.count(tensor, what)
            else:
                reference, size, before = known
                self.alive[storage._cdata] = (reference, size, what)
                self.now[before] -= size
                self.now[what] += size

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count these for nothing: they are in other memory than what is counted."""
        for tensor in tensors:
            self.assign([tensor], AWAY)
            storage = tensor.untyped_storage()
            reference, size, _ = self.alive[storage._cdata]
            self.alive[storage._cdata] = (reference, 0, AWAY)
            self.now[AWAY] -= size
            self.total -= size

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def forget_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak, self.at_peak, self.by_phase, self.parts_by_phase = self.total, dict(self.now), {}, {}


def _a_value(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _size(args: tuple) -> int:
    """Elements of what a factory is asked for: the size is its first argument."""
    if not args or not isinstance(args[0], list | tuple | torch.Size):
        return 0
    size = 1
    for side in args[0]:
        size *= side if isinstance(side, int) else 0
    return size


# What autocast computes in float32 on a GPU and leaves as it is on a CPU, of what networks here use.
IN_FLOAT32 = (
    *("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "softplus", "interpolate", "pow", "exp", "log"),
    *("rsqrt", "reciprocal", "mse_loss", "l1_loss", "smooth_l1_loss", "cumsum", "prod"),
)


class CardAutocast(TorchFunctionMode):
    """Autocast to bfloat16 as a GPU has it, for tensors on the CPU: norms, softmax and powers in float32."""

    FUNCTIONS = {
        getattr(place, name)
        for name in IN_FLOAT32
        for place in (torch, Tensor, torch.nn.functional)
        if hasattr(place, name)
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args = tuple(_float(value) for value in args)
            kwargs = {name: _float(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _float(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
OWN = frozenset(vars(torch.nn.Module()))


def without_data(
    network: torch.nn.Module, fakes: FakeTensorMode, dtype: torch.dtype | None = None, handles: bool = False
) -> torch.nn.Module:
    """The same network with weights and buffers of which `LARGE` ones have no data, floating ones in ``dtype``.

    The network's own tensors may be on any device, the meta device too.  handles: its modules may hold some of paged or
    pinned memory under private names, which must not be copied, and functions that change weights as they are used:
    these are left out.
    """
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.numel() >= LARGE or tensor.is_meta:
            with fakes:
                empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
        else:
            empty = tensor.detach().clone().to("cpu", kind)
        weight = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if weight else empty
    left_out = []
    for name, module in network.named_modules() if handles else ():
        for attribute, value in vars(module).items():
            if attribute.endswith("_function") and isinstance(value, list):
                memo[id(value)] = []
            elif attribute.startswith("_") and attribute not in OWN and not _is_plain(value):
                memo[id(value)] = None
                left_out.append((name, attribute))
    copied = copy.deepcopy(network, memo)
    for name, attribute in left_out:
        delattr(copied.get_submodule(name), attribute)
    return copied


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))
