"""Blocks of a frozen network compiled by torch, one by one: what is compiled for a block serves all that are like it.

The blocks are what gradient checkpointing computes again, so that a recompute runs what the forward ran. Which LoRA is
on is part of what torch compiles for; there is one version for each view of a block.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .lora import LoraSwitch

INDUCTOR = "inductor"
MOST_VERSIONS = 64  # of a block's code: kinds of blocks, times views, times with and without a gradient, times sizes


def check_compilable(network: nn.Module, device: torch.device, backend: str = INDUCTOR) -> None:
    """Raises ValueError where the blocks of a network cannot be compiled, saying why."""
    for name, weight in network.named_parameters():
        if type(weight.data) not in (Tensor, FakeTensor) or not weight.is_floating_point():
            raise ValueError(f"compile: the layer of {name} is quantized and has kernels of its own; set it to false")
    if backend != INDUCTOR:
        return
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))):
        raise ValueError("compile needs a C++ compiler, and there is none on the PATH: install g++, or set it to false")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile needs the package triton on this device: pip install triton, or set it to false")


def compiled(forward: Callable, switch: LoraSwitch, backend: str = INDUCTOR) -> Callable:
    """A block's forward, compiled; as it was inside `LoraSwitch.plainly`."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VERSIONS)
    fast = torch.compile(forward, backend=backend)

    def run(*args, **kwargs):
        return (forward if switch.plain else fast)(*args, **kwargs)

    return run
