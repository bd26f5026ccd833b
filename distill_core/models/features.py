"""Block outputs of a backbone as maps [B, C, H, W], stopping after the last one that is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .lora import LoraSwitch

# What a block works on among its arguments, and a function that gives them with something else in its place.
BlockInput = tuple[Tensor, Callable[[Tensor], tuple[tuple, dict]]]


class _LastTap(Exception):
    """Ends the forward of a backbone once all taps are recorded."""


def spread_taps(blocks: Sequence[str], count: int = 6) -> list[str]:
    """About ``count`` of a network's blocks, evenly spread over its first three quarters."""
    names = blocks[: math.ceil(0.75 * len(blocks))]
    count = min(count, len(names))
    return [names[math.ceil(len(names) * (i + 1) / count) - 1] for i in range(count)]


def depth_scales(blocks: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """The ends of ``count`` equal parts of a network's blocks, and the starts of all parts but the first."""
    count = min(count, len(blocks))
    ends = [len(blocks) * (i + 1) // count for i in range(count)]
    return [blocks[end - 1] for end in ends], [blocks[end] for end in ends[:-1]]


def collect_taps(
    network: nn.Module,
    taps: Sequence[str],
    forward: Callable[[], object],
    switch: LoraSwitch,
    stream: Callable[[object], Tensor] | None = None,
    whole: bool = False,
) -> list[Tensor]:
    """Run ``forward()`` and return the outputs of the modules named ``taps`` (in execution order), with their graph.

    The forward ends after the last tap; if ``whole``, it goes on to its end, and what it returns comes last. Under
    gradient checkpointing it ends after the tapped block's checkpoint has closed, so that the recompute is complete.
    ``stream`` takes the tensor that counts from a block's output; by default a tuple counts with its last tensor, the
    image stream of a two-stream block, a UNet's down block with its first.
    Raises ValueError for an unknown or never executed tap.
    """
    outputs: dict[str, Tensor] = {}
    ends: list[Any] = []
    modules = dict(network.named_modules())
    unknown = [name for name in taps if name not in modules]
    if unknown or not taps:
        raise ValueError(f"no such module to tap: {unknown or 'the list is empty'}")

    def stop_when_complete() -> None:
        if len(outputs) == len(taps) and not whole:
            raise _LastTap

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output) -> None:
            if name not in outputs:
                outputs[name] = (stream or _image_stream)(output)
            if not switch.inside_checkpoint:
                stop_when_complete()

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in taps]
    switch.after_checkpoint = stop_when_complete
    try:
        end = forward()
        ends += [end] if whole else []
    except _LastTap:
        pass
    finally:
        switch.after_checkpoint = None
        for handle in handles:
            handle.remove()
    missing = [name for name in taps if name not in outputs]
    if missing:
        raise ValueError(f"tapped modules never ran: {missing}")
    return [*(outputs[name] for name in taps), *ends]


def _image_stream(output) -> Tensor:
    if not isinstance(output, tuple):
        return output
    if output[0] is not None and output[0].ndim == 4:  # a UNet block: (hidden states, residuals)
        return output[0]
    return output[-1]


def hidden_states_of(args: tuple, kwargs: dict) -> BlockInput:
    """The image as a map, or as tokens (text before it, if any), that a block of diffusers is called with."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], lambda hidden: (args, {**kwargs, "hidden_states": hidden})
    return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)


def tokens_to_map(tokens: Tensor, height: int, width: int, text_tokens: int = 0) -> Tensor:
    """[B, T + H W, C] -> [B, C, H, W]; the leading ``text_tokens`` are dropped. The grid may be non-square."""
    return rearrange(tokens[:, text_tokens:], "b (h w) c -> b c h w", h=height, w=width)


class OutOfPlace(TorchFunctionMode):
    """Runs ``x += y``, ``x -= y``, ``x *= y`` as new tensors, for backbones that update their residual stream in place.

    Without it the taps of such a backbone share one buffer and its gradients are wrong, silently so under gradient
    checkpointing. It must be entered inside a checkpointed block, too, since the recompute runs on its own.
    """

    REPLACED: dict[Callable, Callable] = {Tensor.add_: Tensor.add, Tensor.sub_: Tensor.sub, Tensor.mul_: Tensor.mul}
    REPLACED |= {Tensor.__iadd__: Tensor.__add__, Tensor.__isub__: Tensor.__sub__, Tensor.__imul__: Tensor.__mul__}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.REPLACED.get(func, func)(*args, **(kwargs or {}))
