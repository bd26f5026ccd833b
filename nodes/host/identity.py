"""Which model a MODEL is: its weights as they were loaded, and the patches on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from .model import family_of


def family_name(model) -> str:
    """The family in the table of presets, or the name of the network's class."""
    return family_of(model) or type(model.model.diffusion_model).__name__


def identity(model) -> str:
    """A hash of names, shapes and first values of all weights and of all LoRA-like patches with their strengths.

    It is the same whether the host has the patches in the weights at the moment or not.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        if name.startswith("diffusion_model."):
            saved = model.backup.get(name)
            _add(digest, name, value if saved is None else saved.weight)
    for name, patches in sorted(model.patches.items()):
        for strength, patch, strength_model, *_ in patches:
            digest.update(f"{name} {strength} {strength_model}".encode())
            for tensor in _tensors(getattr(patch, "weights", patch)):
                _add(digest, "", tensor)
    return digest.hexdigest()[:16]


def weights_identity(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and first values of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        _add(digest, name, value)
    return digest.hexdigest()[:16]


def _add(digest, name: str, value: Tensor) -> None:
    """Values count as bfloat16, so that a network loaded in float32 and in bfloat16 is the same one."""
    digest.update(f"{name}{tuple(value.shape)}".encode())
    digest.update(value.detach().flatten()[:16].bfloat16().float().cpu().numpy().tobytes())


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
