"""Names of trained weights in files that core's LoRA loader and, for low-rank matrices, diffusers read.

The names come from the host's own table (comfy.lora.model_lora_keys_unet), read backwards, so whatever is written is
what the host loads. A layer that the host keeps fused (q, k and v in one matrix) has several names there, each for some
of its rows: A is repeated and B is split row-wise, which loses nothing.
"""

from __future__ import annotations

from collections import defaultdict

import comfy.lora
from torch import Tensor, nn

from ...distill_core.models.lora import Lora
from .families import Family

GENERIC = "diffusion_model."
Target = tuple[str, tuple[int, int, int] | None, object]  # weight in the host, (dimension, first row, rows), row order


def export_lora(lora: Lora, model, family: Family) -> dict[str, Tensor]:
    """The tensors of a LoRA file for ``model`` (the host's model_base object), its scale folded in. CPU copies.

    Layout: diffusers/peft (``transformer.….lora_A.weight``) where the host has a table of diffusers' names; kohya's
    with diffusers' names for UNets (``lora_unet_….lora_down.weight``), the only one that core and diffusers both read
    there; else the generic ``diffusion_model.….lora_A.weight`` (Wan, Lumina 2), which diffusers converts for Wan.
    Core's SaveLoRA and LoraModelLoader (LORA_MODEL) take the same dictionary.
    """
    kohya = family.key_prefix == "lora_unet_"
    down_name, up_name = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    names = _names_by_weight(model, family)
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
    """What must be added to the weights of ``original`` to have those of ``network``, as a file of core's LoRA loaders.

    Float32 on the CPU, under the generic names (``diffusion_model.LAYER.diff``, ``.diff_b`` for a bias); weights that
    are the same in both are left out. diffusers does not read such files.
    """
    state, before = {}, dict(original.named_parameters())
    layers = {name.removesuffix(".weight") for name in before if name.endswith(".weight")}
    for name, value in network.named_parameters():
        difference = (value.detach() - before[name].detach().float()).cpu()
        if not difference.any():
            continue
        layer, _, kind = name.rpartition(".")
        own_name = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b" if layer in layers else f"{name}.diff"}
        state[GENERIC + own_name.get(kind, f"{name}.diff")] = difference.contiguous()
    return state


def _names_by_weight(model, family: Family) -> dict[str, dict[str, Target]]:
    """Layer in the network -> LoRA names of the family's kind -> the part of its weight they stand for."""
    names: dict[str, dict[str, Target]] = defaultdict(dict)
    for name, to in comfy.lora.model_lora_keys_unet(model, {}).items():
        weight, rows, reorder = (*(to if isinstance(to, tuple) else (to,)), None, None)[:3]
        wanted = name.startswith(family.key_prefix) and not name.endswith(family.foreign)
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
