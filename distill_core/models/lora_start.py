"""Starting a LoRA from a file: whose layers fit, and how their matrices become this LoRA's.

A file may have other names for the layers (diffusers, peft, kohya), another rank and alpha, and several small LoRAs on
the rows of one layer (q, k and v apart where a network keeps them in one matrix).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .lora import Lora
from .strengths import split_strengths

PREFIXES = ("", "transformer_", "unet_", "lora_unet_", "lora_transformer_", "diffusion_model_", "base_model_model_")
MATRIX = re.compile(r"(.+?)[._](lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight")
DOWN = ("lora_A", "lora_down", "lora.down")
OF_TEXT = ("lora_te", "text_encoder", "te_", "te1_", "te2_")


class Part(NamedTuple):
    """B A of a LoRA on some rows of a layer: up [rows, r], with the file's scale in it; down [r, in]; the first row."""

    up: Tensor
    down: Tensor
    first: int = 0


Parts = dict[str, list[Part]]  # layer -> what the file has for it


def parts_by_name(state: Mapping[str, Tensor], layers: Iterable[str]) -> tuple[Parts, list[str]]:
    """The matrices of a file in diffusers', peft's or kohya's names, by layer, and the names that fit no layer.

    Text encoders' are left out, and so is the embedding of strengths, which is 0 at the default ones. Raises ValueError
    for a file whose tensors are not pairs of matrices.
    """
    known = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in split_strengths(state)[0].items():
        match = MATRIX.fullmatch(key)
        if match:
            name, kind = match[1], "down" if match[2] in DOWN else "up"
        elif key.endswith(".alpha"):
            name, kind = key.removesuffix(".alpha"), "alpha"
        else:
            raise ValueError(f"{key} is no matrix of a LoRA: other kinds of adapters (LoHa, LoKr, DoRA) cannot be used")
        if not name.startswith(OF_TEXT):
            found.setdefault(name, {})[kind] = value
    parts: Parts = {}
    strange = []
    for name, given in found.items():
        flat = name.replace(".", "_")
        layer = next((known[flat[len(p) :]] for p in PREFIXES if flat.startswith(p) and flat[len(p) :] in known), None)
        if layer is None or "up" not in given or "down" not in given:
            strange.append(name)
            continue
        scale = float(given["alpha"]) / len(given["down"]) if "alpha" in given else 1.0
        parts[layer] = [Part(given["up"].float() * scale, given["down"].float())]
    return parts, strange


@torch.no_grad()
def start_lora(lora: Lora, parts: Parts, strange: list[str], name: str, what: str = "start_from") -> None:
    """Give a fresh LoRA the function of a file's (`Part`). What it has more of, ranks and layers, stays without effect.

    name, what: of the file, and whose it is, for messages. Raises ValueError where none of the file fits, where
    something of it would be lost (a layer that is not trained, a higher rank), or where a shape is another.
    """
    mine = {target: (down, up) for target, down, up in zip(lora.targets, lora.down, lora.up, strict=True)}
    if not parts:
        first = f"; its first layer is {strange[0]}" if strange else ""
        raise ValueError(f"{what}: no layer of {name} is one of this model's{first}. Choose a LoRA for this model")
    lost = [*strange, *(layer for layer in parts if layer not in mine)]
    if lost:
        raise ValueError(
            f"{what}: {name} changes {len(lost)} layers that this student does not train (first: {lost[0]}): "
            "leave the LoRA's target layers empty, or connect that LoRA to the model instead of starting from it"
        )
    for layer, given in parts.items():
        down, up = mine[layer]
        shared = all(torch.equal(part.down, given[0].down) for part in given)  # as q, k and v of our own files
        downs = [given[0].down] if shared else [part.down for part in given]
        rank = sum(map(len, downs))
        if rank > lora.rank:
            raise ValueError(
                f"{what}: {name} has rank {rank} (layer {layer}) and the student {lora.rank}: set its rank to at "
                f"least {rank}"
            )
        fits = all(part.down.shape[1] == down.shape[1] and part.first + len(part.up) <= len(up) for part in given)
        if not fits:
            raise ValueError(f"{what}: {name} is a LoRA of another model: layer {layer} has another shape there")
        down[:rank].copy_(torch.cat(downs))
        column = 0
        for part in given:
            columns = slice(0, rank) if shared else slice(column, column + part.up.shape[1])
            up[part.first : part.first + len(part.up), columns].copy_(part.up / lora.scale)
            column = columns.stop
