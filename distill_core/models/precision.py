"""Weights in the number format, and on the device, that training computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """The module there; untouched where it is there already (weights without data cannot be exchanged)."""
    return module if all(p.device == device for p in module.parameters()) else module.to(device)


@torch.no_grad()
def halves_to_bfloat16(network: nn.Module) -> None:
    """Turn a frozen network's float16 weights into bfloat16, one at a time: what autocast would make of them.

    Autocast would round them at every use, keep that copy for the backward, and add the two formats to float32
    wherever they meet. Other formats, quantized ones too, stay as they are.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dtype == torch.float16 and type(tensor.data) in (Tensor, FakeTensor):
            tensor.data = tensor.data.bfloat16()
    if vars(network).get("dtype") == torch.float16:  # ComfyUI's networks are told what their inputs are cast to
        network.__dict__["dtype"] = torch.bfloat16


@torch.no_grad()
def channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out as their fast kernels read them; what flows through follows."""
    for weight in network.parameters():
        if weight.ndim == 4 and type(weight.data) in (Tensor, FakeTensor):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def check_in_full(network: nn.Module) -> None:
    """Raises ValueError for a network with quantized weights, which cannot be trained themselves."""
    for name, weight in network.named_parameters():
        if type(weight.data) not in (Tensor, FakeTensor) or not weight.is_floating_point():
            raise ValueError(
                f"a quantized network ({name}) cannot be copied to be trained: load a file in bfloat16, float16 or "
                "plain fp8, or train a LoRA"
            )
