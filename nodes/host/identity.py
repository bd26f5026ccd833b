"""Which model a MODEL is: its weights as they were loaded, and the patches on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import Tensor

from ...distill_core.files import digest_tensor
from ...distill_core.files import weights_digest as weights_identity  # by its former name, until parts.py uses the new
from .model import family_of

__all__ = ["family_name", "identity", "weights_identity"]


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
            digest_tensor(digest, name, value if saved is None else saved.weight)
    for name, patches in sorted(model.patches.items()):
        for strength, patch, strength_model, *_ in patches:
            digest.update(f"{name} {strength} {strength_model}".encode())
            for tensor in _tensors(getattr(patch, "weights", patch)):
                digest_tensor(digest, "", tensor)
    return digest.hexdigest()[:16]


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
