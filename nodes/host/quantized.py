"""Frozen linear layers whose weight is not stored as it is multiplied by: quantized ones, and plain fp8.

The forward is the layer's own, whatever kernel the host or a loader gives it. The gradient to its input goes through
the weight in full, which is made again in the backward: kernels that round their input have none of their own (some
round it to integers once more, some refuse), and a weight kept from the forward would take the room that was saved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
InFull = Callable[[Tensor, torch.dtype], Tensor]  # (stored weight, dtype) -> weight [out, in]


def is_quantized(weight: Tensor | None) -> bool:
    """Whether a weight is of a class that keeps it in fewer bits than its dtype says (the host's, GGUF's)."""
    return weight is not None and type(weight.data) not in (Tensor, FakeTensor)


def in_full(layer: nn.Module) -> InFull | None:
    """What makes a linear layer's weight in full; None where it is stored so, or in a way that is not known.

    Known are layers with ``get_weight`` (ComfyUI-GGUF's), the host's quantized tensors and plain fp8.
    """
    if hasattr(layer, "get_weight"):
        return layer.get_weight
    if is_quantized(layer.weight):
        return _dequantized if hasattr(layer.weight.data, "_qdata") else None
    return Tensor.to if layer.weight.dtype in FP8 else None


def _dequantized(weight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize().to(dtype)


def with_gradient(layer: nn.Module) -> Callable:
    """The forward of a layer that has an `in_full`, with the gradient of the weight in full."""
    own, make, smoothing = layer.forward, in_full(layer), getattr(layer, "pre_quant_scale", None)

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return own(x, *args, **kwargs)
        return _ThroughWeight.apply(x, layer.weight, smoothing, own, make)

    return forward


class _ThroughWeight(torch.autograd.Function):
    """own(x), with the gradient of F.linear(x * smoothing, weight in full) to x; that one has a gradient as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, smoothing: Tensor | None, own: Callable, make: InFull):
        ctx.save_for_backward(weight, smoothing)
        ctx.make, ctx.dtype = make, x.dtype
        return own(x.detach())

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        weight, smoothing = ctx.saved_tensors
        result = grad @ ctx.make(weight, grad.dtype)
        if smoothing is not None:
            result = result * smoothing.to(result)
        return result.to(ctx.dtype), None, None, None, None
