"""Frozen blocks in host memory or in a mapped file, on the device only while they run; inputs of blocks likewise.

A block's weights come to the device when it is entered, the next block's are fetched meanwhile, and they go when it is
left: in the forward, in a recompute of gradient checkpointing, and in forwards without gradients. What the backward of
a block needs of them stays alive with its saved tensors. Values are never changed, so the student is the same to the
last bit. Without gradient checkpointing it works and saves nothing: every block's weights are saved for the backward.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files import is_abandoned, remove

NONE, RAM, FILE = TIERS = ("none", "ram", "file")
ALIGNMENT = 64  # bytes: that of torch's own memory


class Offload:
    """The frozen weights of a network's blocks, kept away from the device.

    network: everything in it that is not a block's moves to ``device`` and stays there.  blocks: in the order in which
    they run; each must be called through `around`.  tier: "ram", or "file": written to ``folder`` and
    mapped from there, so that the system may drop their pages and read them again.
    copies: copy even where weights are on the device already (a CPU), as a plan for a GPU does.
    runs, with_gradient, moved: block runs, those that keep a graph, and bytes fetched for them, so far.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device | str,
        tier: str = RAM,
        folder: str | Path | None = None,
        copies: bool = False,
    ) -> None:
        self.device, self.tier, self.copies = torch.device(device), tier, copies
        self.homes = [_frozen(block) for block in blocks]
        self.runs = self.with_gradient = self.moved = 0
        self.waiting: dict[int, list[Tensor] | Future] = {}  # blocks that were fetched ahead; at most one
        self.last = -1
        self.pinned: list[Tensor] = []
        away = {id(weight) for block in self.homes for _, _, weight in block}
        for tensor in (*network.parameters(), *network.buffers()):
            if id(tensor) not in away and tensor.device != self.device:
                tensor.data = tensor.data.to(self.device)
        for block in self.homes:
            for _, _, weight in block:
                if weight.device.type != "cpu":
                    weight.data = weight.data.cpu()
        if tier == FILE:
            self._map(Path(folder or "."))
        gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if gpu else None
        # Reading a mapped file, and copying from memory that is not page-locked, would hold up the computing.
        self.worker: Executor | None = ThreadPoolExecutor(1) if gpu or (tier == FILE and not copies) else None
        if gpu and tier == RAM:
            self.pinned = [w.data for block in self.homes for _, _, w in block if page_lock(w.data)]

    @property
    def size(self) -> int:
        """Bytes that are kept away."""
        return sum(_bytes(block) for block in self.homes)

    @property
    def largest(self) -> int:
        """Bytes of the largest block."""
        return max(map(_bytes, self.homes), default=0)

    def weights(self) -> list[Tensor]:
        """The weights of all blocks, where they are kept."""
        return [weight for block in self.homes for _, _, weight in block]

    def around(self, index: int, forward: Callable) -> Callable:
        """The forward of block ``index``, with its weights on the device while it runs."""

        def run(*args, **kwargs):
            self._bring(index)
            try:
                return forward(*args, **kwargs)
            finally:  # a recompute ends with an exception as soon as it has all that the backward needs
                for module, name, home in self.homes[index]:
                    module._parameters[name] = home

        return run

    def _bring(self, index: int) -> None:
        found = self.waiting.pop(index, None)
        arrived = found.result() if isinstance(found, Future) else self._fetch(index) if found is None else found
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in arrived:
                tensor.record_stream(current)  # it was made on the other stream, which may not reuse it too early
        for (module, name, _), tensor in zip(self.homes[index], arrived, strict=True):
            module._parameters[name] = tensor  # type: ignore[assignment]  # a frozen weight need not be a Parameter
        self.runs, self.with_gradient = self.runs + 1, self.with_gradient + torch.is_grad_enabled()
        # A backward walks through the blocks from the last one that ran to the first.
        ahead = index + 1 if index > self.last or index == 0 else index - 1
        self.last = index
        self.waiting.clear()
        if 0 <= ahead < len(self.homes):
            self.waiting[ahead] = self.worker.submit(self._fetch, ahead) if self.worker else self._fetch(ahead)

    def _fetch(self, index: int) -> list[Tensor]:
        """A block's weights on the device; where they are there already, their pages are read in."""
        homes = [home.detach() for _, _, home in self.homes[index]]
        self.moved += sum(map(_size, homes))
        if self.device.type == "cpu" and not self.copies:
            if self.tier == FILE:
                for home in homes:
                    home.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()
            return homes
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type]  # None: nothing happens
            return [home.to(self.device, non_blocking=True, copy=self.copies) for home in homes]

    def _map(self, folder: Path) -> None:
        """Write the weights to files, a block at a time, and let them lie there; quantized ones stay in memory.

        Raises OSError where the disk has no room for them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("offloaded_*.tmp"):
            if is_abandoned(left):
                remove(left)
        for index, block in enumerate(self.homes):
            path = folder / f"offloaded_{index}.{os.getpid()}.tmp"
            map_into(path, [weight for _, _, weight in block if type(weight.data) is Tensor])
            with suppress(OSError):  # what is mapped stays without its name; Windows keeps it until the next run
                path.unlink()

    def close(self) -> None:
        """End the thread and give page-locked memory back."""
        if self.worker is not None:
            self.worker.shutdown()
        self.waiting.clear()
        for tensor in self.pinned:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self.pinned = []


Home = tuple[nn.Module, str, nn.Parameter]  # a layer, the name of its weight, and the weight


def _frozen(block: nn.Module) -> list[Home]:
    """The frozen weights of a block and of its layers."""
    layers = list(block.modules())
    named = [(layer, name, p) for layer in layers for name, p in layer._parameters.items() if p is not None]
    return [(layer, name, p) for layer, name, p in named if not p.requires_grad]


def _size(tensor: Tensor) -> int:
    stored = getattr(tensor.data, "_qdata", tensor)  # ComfyUI's quantized weights
    return stored.numel() * stored.element_size()


def _bytes(block: Sequence[Home]) -> int:
    return sum(_size(weight) for _, _, weight in block)


@torch.no_grad()
def map_into(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write tensors to a file and let them lie there, mapped, as aligned as they were: products round alike."""
    places, size = [], 0
    with open(path, "wb") as file:
        for tensor in tensors:
            file.write(bytes(-size % ALIGNMENT))
            places.append(size + -size % ALIGNMENT)
            size = places[-1] + file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    if size:
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        for tensor, place in zip(tensors, places, strict=True):
            mapped = torch.empty(0, dtype=tensor.dtype)
            tensor.data = mapped.set_(storage, place // tensor.element_size(), tensor.shape)  # type: ignore[call-overload]


def page_lock(tensor: Tensor) -> bool:
    """Page-lock a tensor's memory, so that copies of it run beside the computing; False where the driver does not."""
    if type(tensor) is not Tensor or not tensor.is_contiguous():
        return False
    code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)
    if int(code):
        with suppress(RuntimeError):  # the error of the call would be reported by the next kernel
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1)
    return not int(code)


class KeptInputs:
    """A block with its inputs; those that a gradient passes are in host memory from its forward to its recompute.

    Others (texts, positions) are the same tensors for many blocks, and stay. keep: brings a tensor there.
    """

    def __init__(self, block: Callable, args: Sequence, kwargs: Mapping, keep: Callable[[Tensor], Tensor]) -> None:
        self.block, self.given, self.keep = block, (args, kwargs), keep
        self.kept: tuple | None = None

    def __call__(self):
        if self.kept is None:
            args, kwargs = self.given
            self.kept = tuple(map(self._away, args)), {name: self._away(value) for name, value in kwargs.items()}
            del self.given
        else:
            args, kwargs = tuple(map(_back, self.kept[0])), {name: _back(value) for name, value in self.kept[1].items()}
        return self.block(*args, **kwargs)

    def _away(self, value):
        moves = isinstance(value, Tensor) and value.requires_grad
        return Kept(self.keep(value.detach()), value.device) if moves else value


class Kept(NamedTuple):
    """A tensor in host memory, and where it belongs."""

    value: Tensor
    device: torch.device


def _back(value):
    if not isinstance(value, Kept):
        return value
    # Made by an operation, as it was: a block may change it in place, which torch refuses for a leaf.
    return value.value.requires_grad_().to(value.device, non_blocking=True, copy=True)


def to_host(value: Tensor) -> Tensor:
    """A copy in page-locked host memory. It is not waited for: what reads it on the same stream comes later."""
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
