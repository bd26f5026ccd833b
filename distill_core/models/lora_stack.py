"""LoRAs under a student: put into the model's weights before it is trained, and joined with it into one file after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..digests import weights_digest
from ..files import check_finite, load_tensors
from .lora import Lora
from .lora_start import Parts, parts_by_name, start_lora

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = "mini"  # stands for the mini model's own student


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on disk as it is for a network: what it has for each layer, and what its metadata say."""

    name: str
    digest: str
    parts: Parts
    metadata: dict[str, str]

    def below(self) -> dict[str, Any]:
        """How a student that is trained above it names it (`presets.origin.LoraBelow`)."""
        return {"digest": self.digest, "strength": 1.0, "layers": len(self.parts), "name": self.name}

    def weighted(self, weight: float) -> LoraFile:
        """The same at another strength."""
        parts = {layer: [part._replace(up=weight * part.up) for part in of] for layer, of in self.parts.items()}
        return replace(self, parts=parts)


def read_lora_file(path: str, layers: Sequence[str]) -> LoraFile:
    """A LoRA file for a network with these linear layers; "mini" is the shipped student.

    Raises ValueError for another kind of file, and where a part of it fits no layer: it would be lost.
    """
    file = ASSETS / "mini" / "student.safetensors" if path == SHIPPED else Path(path)
    state, metadata = load_tensors(file)
    check_finite(state, file, "choose another LoRA")
    try:
        parts, strange = parts_by_name(state, layers)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    if strange or not parts:
        where = f" (first: {strange[0]})" if strange else ""
        raise ValueError(
            f"{file.name} changes {len(strange)} layers that are no linear layers of this model{where}: choose a LoRA "
            "for this model, or put it into the model's weights with the program it was made with"
        )
    return LoraFile(file.name, weights_digest(state), parts, metadata)


@torch.no_grad()
def put_into_weights(network: torch.nn.Module, lora: LoraFile) -> None:
    """Add a LoRA at strength 1 to the weights. Raises ValueError for one whose layers have another shape."""
    for layer, parts in lora.parts.items():
        weight = network.get_parameter(f"{layer}.weight")
        for part in parts:
            rows = slice(part.first, part.first + len(part.up))
            if weight[rows].shape != (len(part.up), part.down.shape[1]):
                raise ValueError(f"{lora.name} is a LoRA of another model: layer {layer} has another shape there")
            weight[rows] += (part.up @ part.down).to(weight)


def joined(state: dict[str, Tensor], below: Sequence[LoraFile], prefix: str) -> dict[str, Tensor]:
    """A student's `Lora.export` and the LoRAs under it as one LoRA: their matrices side by side, which loses nothing.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2].
    """
    result = dict(state)
    for lora in below:
        for layer, parts in lora.parts.items():
            names = [f"{prefix}.{layer}.lora_{matrix}.weight" for matrix in "AB"]
            downs, ups = [part.down for part in parts], [part.up for part in parts]
            if names[0] in result:
                downs, ups = [result[names[0]], *downs], [result[names[1]], *ups]
            result[names[0]], result[names[1]] = torch.cat(downs), torch.cat(ups, dim=1)
    return result


def frozen_lora(backend: Any, path: str, what: str) -> Lora:
    """A frozen LoRA of a file beside the layers of a backend.  what: whose it is, for messages.

    Raises ValueError where it does not fit.
    """
    file = Path(path)
    state, _ = load_tensors(file)
    check_finite(state, file, f"choose another {what}")
    parts, strange = backend.lora_parts(state)
    if not parts:
        raise ValueError(f"{what}: no layer of {file.name} is one of this model's; choose one of this model")
    if strange:
        raise ValueError(
            f"{what}: {file.name} changes {len(strange)} layers that are none of this model's blocks (first: "
            f"{strange[0]}), which would be lost; choose one of this model"
        )
    return frozen_parts(backend, parts, file.name, what)


def frozen_parts(backend: Any, parts: Parts, name: str, what: str) -> Lora:
    """The same of matrices that were read already.  name: of where they are from."""
    lora = backend.new_lora(rank_of_parts(parts), list(parts))
    start_lora(lora, parts, [], name, what)
    return lora.requires_grad_(False)


def rank_of_parts(parts: Parts) -> int:
    """The rank of a LoRA that can be all of them."""
    return max(sum(len(part.down) for part in given) for given in parts.values())
