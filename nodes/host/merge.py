"""A student and the LoRAs below it as one LoRA file: all that is patched into a MODEL's weights, for core's loader.

Low-rank matrices of one layer are put side by side, which loses nothing: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. A layer with
another kind of patch (LoKr, DoRA, a merged model, all weights) is written as the whole difference it makes.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ...distill_core.models.lora import difference_names
from .architectures import architecture_of
from .identity import NETWORK
from .lora_keys import LowRankNames

Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]  # as the host keeps it: strength, what, ...


def merged_patches(model) -> dict[str, Tensor]:
    """The tensors of a LoRA file that gives MODEL's weights on the weights as they were loaded, float32 on the CPU."""
    network = model.model.diffusion_model
    names = LowRankNames(model.model, architecture_of(network))
    others = difference_names(network, NETWORK.removesuffix("."))
    weights, state = model.model.state_dict(), {}
    for key, patches in model.patches.items():
        own = key.removeprefix(NETWORK)
        factors = [_factors(patch, weights[key].shape) for patch in patches]
        if key.endswith(".weight") and all(factors):
            down = torch.cat([down for down, _ in factors])
            up = torch.cat([up for _, up in factors], dim=1)
            state |= names.write(own.removesuffix(".weight"), down, up, weights[key].shape, compact=True)
        else:
            saved = model.backup.get(key)
            difference = _difference(patches, weights[key] if saved is None else saved.weight, key)
            if difference.any():
                state[others[own]] = difference
    return state


def _factors(patch: Patch, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """(A [r, in], B [out, r]) of a plain LoRA with its strength in B, as wide as the layer; None for other patches."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1:
        return None
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    down, up = down.detach().float().cpu().flatten(1), up.detach().float().cpu().flatten(1)
    up = up * (strength * (1.0 if alpha is None else alpha / len(down)))
    if function is not None:  # the host's swap halves of the rows, which B alone can do
        whole, up = up @ down, function(up)
        if not torch.allclose(function(whole), up @ down, atol=1e-6):
            return None
    if offset is None:
        return down, up
    dimension, first, count = offset  # a part of a fused layer
    if dimension == 0:
        whole = up.new_zeros(shape[0], up.shape[1])
        whole[first : first + count] = up
        return down, whole
    whole = down.new_zeros(len(down), shape[1:].numel())
    whole[:, first : first + count] = down
    return whole, up


def _difference(patches: list[Patch], weight: Tensor, key: str) -> Tensor:
    """What the patches make of a weight, less the weight."""
    before = weight.detach().float().cpu()
    original = {key: [(before.clone(),)]}
    return comfy.lora.calculate_weight(patches, before.clone(), key, original_weights=original).contiguous() - before
