"""Names of trained weights in files that core's LoRA loader and, for low-rank matrices, diffusers read.

The names come from the host's own table (comfy.lora.model_lora_keys_unet), read backwards, so whatever is written is
what the host loads. A layer that the host keeps fused (q, k and v in one matrix) has several names there, each for some
of its rows: A is repeated and B is split row-wise, which loses nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ...distill_core.models.lora import Lora, weight_differences
from ...distill_core.models.lora_start import OF_TEXT, Part, Parts
from .architectures import Architecture

GENERIC = "diffusion_model."
Target = tuple[str, tuple[int, int, int] | None, object]  # weight in the host, (dimension, first row, rows), row order


class LowRankNames:
    """Writes low-rank matrices under names that core and diffusers read.

    diffusers/peft (``transformer.….lora_A.weight``) where the host has a table of diffusers' names; kohya's with
    diffusers' names for UNets (``lora_unet_….lora_down.weight``), the only one that core and diffusers both read there;
    else the generic ``diffusion_model.….lora_A.weight`` (Wan, Lumina 2), which diffusers converts for Wan.
    """

    def __init__(self, model, architecture: Architecture) -> None:
        """model: the host's model_base object."""
        self.kohya = architecture.key_prefix == "lora_unet_"
        self.ends = ("lora_down", "lora_up") if self.kohya else ("lora_A", "lora_B")
        self.names = _names_by_weight(model, architecture)

    def write(
        self, layer: str, down: Tensor, up: Tensor, shape: Sequence[int], compact: bool = False
    ) -> dict[str, Tensor]:
        """B A of a layer whose weight has ``shape``. down: A [r, in].  up: B [out, r], scale included.  CPU copies.

        compact: leave out columns of B that are 0 in all rows of a name; ranks then differ from name to name.
        """
        state = {}
        for name, rows, reorder in _cover(self.names.get(layer, {}), layer, len(up)):
            part = up if rows is None else up.narrow(*rows)
            used = part.any(0) if compact and part.any() else slice(None)
            part, narrow = part[:, used], down[used]
            matrices = (
                narrow.reshape(-1, *shape[1:]),
                (reorder(part) if reorder else part).reshape(len(part), -1, *[1] * (len(shape) - 2)),
            )
            for end, matrix in zip(self.ends, matrices, strict=True):
                state[f"{name}.{end}.weight"] = matrix.detach().cpu().clone().contiguous()
            if self.kohya:
                state[f"{name}.alpha"] = torch.tensor(float(len(narrow)))
        return state


def export_lora(lora: Lora, model, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of a LoRA file for ``model`` (the host's model_base object), its scale folded in; see `LowRankNames`.

    Core's SaveLoRA and LoraModelLoader (LORA_MODEL) take the same dictionary.
    """
    names, state = LowRankNames(model, architecture), {}
    for target, down, up in zip(lora.targets, lora.down, lora.up, strict=True):
        state |= names.write(target, down.detach(), up.detach() * lora.scale, (len(up), down.shape[1]))
    return state


def read_parts(state: dict[str, Tensor], model) -> tuple[Parts, list[str]]:
    """A LoRA file in any names that the host reads, by layer, and the layers of it that the host or we cannot place.

    Raises ValueError for another kind of adapter than a LoRA of two matrices.
    """
    patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
    parts: Parts = defaultdict(list)
    read: set[str] = set()
    for target, adapter in patches.items():
        weight, rows, reorder = (*(target if isinstance(target, tuple) else (target,)), None, None)[:3]
        part = part_of(adapter, rows, reorder)
        if part is None:
            raise ValueError(f"{weight} is no plain LoRA of two matrices there: another kind of adapter cannot be used")
        read |= adapter.loaded_keys
        parts[layer_of(weight)].append(part)
    strange = {key for key in state if key not in read and not key.endswith(".alpha") and not key.startswith(OF_TEXT)}
    return dict(parts), sorted(strange)


def part_of(adapter, rows: tuple[int, int, int] | None, reorder: Callable | None, strength: float = 1.0) -> Part | None:
    """What the host has read of a LoRA for a weight, or for some of its rows; None for another kind of adapter.

    rows: (dimension, first row, rows).  reorder: the host has the rows of some layers in another order than the file.
    """
    up, down, alpha, *others = adapter.weights if isinstance(adapter, LoRAAdapter) else [None] * 6
    if up is None or any(value is not None for value in others) or (rows and rows[0] != 0):
        return None
    scale, up = strength * (1.0 if alpha is None else alpha / len(down)), reorder(up) if reorder else up
    return Part(up.float() * scale, down.float(), rows[1] if rows else 0)


def layer_of(weight: str) -> str:
    """The layer in the network whose weight the host calls this."""
    return weight.removeprefix(GENERIC).removesuffix(".weight")


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
            names[layer_of(weight)][name] = (weight, rows, reorder)
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
