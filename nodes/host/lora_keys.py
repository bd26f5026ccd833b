"""Names of trained weights in files that core's LoRA loader and, for low-rank matrices, diffusers read.

The names come from the host's own table (comfy.lora.model_lora_keys_unet), read backwards, so whatever is written is
what the host loads. A layer that the host keeps fused (q, k and v in one matrix) has several names there, each for some
of its rows: A is repeated and B is split row-wise, which loses nothing.
"""

from __future__ import annotations

from collections import defaultdict

import comfy.lora
from torch import Tensor, nn

from ...distill_core.models.lora import Lora, weight_differences
from .architectures import Architecture

GENERIC = "diffusion_model."
Target = tuple[str, tuple[int, int, int] | None, object]  # weight in the host, (dimension, first row, rows), row order


def export_lora(lora: Lora, model, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of a LoRA file for ``model`` (the host's model_base object), its scale folded in. CPU copies.

    Layout: diffusers/peft (``transformer.….lora_A.weight``) where the host has a table of diffusers' names; kohya's
    with diffusers' names for UNets (``lora_unet_….lora_down.weight``), the only one that core and diffusers both read
    there; else the generic ``diffusion_model.….lora_A.weight`` (Wan, Lumina 2), which diffusers converts for Wan.
    Core's SaveLoRA and LoraModelLoader (LORA_MODEL) take the same dictionary.
    """
    kohya = architecture.key_prefix == "lora_unet_"
    down_name, up_name = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    names = _names_by_weight(model, architecture)
    state = {}
    for target, down, up in zip(lora.targets, lora.down, lora.up, strict=True):
        matrix = up.detach() * lora.scale
        for name, rows, reorder in _cover(names.get(target, {}), target, len(matrix)):
            part = matrix if rows is None else matrix.narrow(*rows)
            state[f"{name}.{down_name}.weight"] = down.detach().cpu().clone().contiguous()
            state[f"{name}.{up_name}.weight"] = (reorder(part) if reorder else part).cpu().clone().contiguous()
            if kohya:
                state[f"{name}.alpha"] = down.new_tensor(float(lora.rank)).cpu()
    return state


def export_differences(network: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """`models.lora.weight_differences` under the host's generic names (``diffusion_model.LAYER.diff``), which core's
    LoRA loaders read; diffusers does not."""
    return weight_differences(network, original, GENERIC.removesuffix("."))


def _names_by_weight(model, architecture: Architecture) -> dict[str, dict[str, Target]]:
    """Layer in the network -> LoRA names of the family's kind -> the part of its weight they stand for."""
    names: dict[str, dict[str, Target]] = defaultdict(dict)
    for name, to in comfy.lora.model_lora_keys_unet(model, {}).items():
        weight, rows, reorder = (*(to if isinstance(to, tuple) else (to,)), None, None)[:3]
        wanted = name.startswith(architecture.key_prefix) and not name.endswith(architecture.foreign)
        if wanted and weight.startswith(GENERIC) and weight.endswith(".weight"):
            names[weight.removeprefix(GENERIC).removesuffix(".weight")][name] = (weight, rows, reorder)
    return names


def _cover(names: dict[str, Target], layer: str, height: int) -> list[tuple[str, tuple | None, object]]:
    """Names whose rows make up the whole layer: diffusers' separate ones, a name for all of it, or the generic name."""
    parts = sorted(((rows, name) for name, (_, rows, _) in names.items() if rows is not None), key=lambda part: part[0])
    ends = [first + count for (_, first, count), _ in parts]
    starts = [first for (_, first, _), _ in parts]
    if parts and starts == [0, *ends[:-1]] and ends[-1] == height:
        return [(name, rows, None) for rows, name in parts]
    whole = [(name, None, reorder) for name, (_, rows, reorder) in names.items() if rows is None]
    return whole[-1:] or [(GENERIC + layer, None, None)]
