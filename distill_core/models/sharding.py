"""Weights shared out among processes, each on a card of its own (FSDP2: torch's ``fully_shard``).

Every process keeps a part of each weight. It has a block whole only while that runs, in the forward and in the
backward, and gradients are averaged and shared out again as soon as a block's backward is done (ZeRO stage 3,
Rajbhandari et al. 2020; Zhao et al. 2023, arXiv 2304.11277). Of a frozen network only the blocks are shared out: a
forward for features ends inside it, and what is gathered for the whole forward would wait for an end that never comes.

accelerate starts the processes and talks between them. Its own plugin for FSDP2 takes one network with its optimizer,
and none on CPUs (version 1.15), so the networks are shared out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Sharding:
    """How weights are shared out among all processes.

    device: of this process.  compute: the number format that blocks are gathered and computed in, None for the
    weights' own; gradients are averaged in float32.  rank, world: of this process, and their number.
    Raises ValueError where torch cannot do it.
    """

    def __init__(self, device: torch.device | str, compute: torch.dtype | None = None) -> None:
        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy
        except ImportError as error:
            raise ValueError("[train] shard needs torch 2.7 or newer with torch.distributed") from error
        self.device = torch.device(device)
        self.mesh = init_device_mesh(self.device.type, (torch.distributed.get_world_size(),))
        self.rank, self.world = self.mesh.get_rank(), self.mesh.size()
        self.policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)

    def share_out(self, network: nn.Module, blocks: Sequence[str]) -> None:
        """Leave this process its part of the weights of a network that all processes have.

        blocks: what is gathered at a time, in the order in which it runs. Where the network is to be trained,
        everything outside of them is one more. It comes to the device a block at a time.
        """
        from torch.distributed.fsdp import fully_shard

        trained = any(p.requires_grad for p in network.parameters())
        rest = _outside(network, [network.get_submodule(name) for name in blocks])
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": self.policy, "reshard_after_forward": True}
        for name in blocks:
            fully_shard(network.get_submodule(name), **options)
        if not trained:
            options["ignored_params"] = set(rest)
            for tensor in (*rest, *network.buffers()):
                if not tensor.is_meta:
                    tensor.data = tensor.data.to(self.device)
        fully_shard(network, **options)

    @torch.no_grad()
    def fill(self, network: nn.Module, source: nn.Module) -> None:
        """Give a network that was shared out on the meta device the weights and buffers of ``source``."""
        network.to_empty(device=self.device)
        for name, buffer in network.named_buffers():
            buffer.copy_(source.get_buffer(name))
        given = dict(source.named_parameters())
        for name, weight in network.named_parameters():
            part(weight).copy_(self._mine(given[name]))

    def _mine(self, weight: Tensor) -> Tensor:
        """This process's rows of a weight, which it has whole or as those rows."""
        if is_shared(weight):
            return part(weight)
        rows = weight.chunk(self.world)
        return rows[self.rank] if self.rank < len(rows) else weight[:0]


def _outside(network: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    inside = {id(p) for block in blocks for p in block.parameters()}
    return [p for p in network.parameters() if id(p) not in inside]


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is shared out among processes."""
    return hasattr(tensor, "to_local")


def part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out, in the memory of that; another tensor itself."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor whole, from the parts of all processes. Where it is shared out, all must ask for it."""
    return tensor.detach().full_tensor() if is_shared(tensor) else tensor  # type: ignore[attr-defined]


def is_answered(tensor: Tensor) -> bool:
    """Whether this process keeps what was made of `whole`: where a tensor is shared out, the first one does."""
    return not is_shared(tensor) or tensor.device_mesh.get_rank() == 0  # type: ignore[attr-defined]
