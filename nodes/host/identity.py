"""Which model a MODEL is: its weights as they were loaded, the patches on them, and what else it carries."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...distill_core.digests import digest_tensor, stored_weights
from ...distill_core.presets.origin import NAME_KEYS, LoraBelow
from .carried import carried

NETWORK = "diffusion_model."
LAYOUT = "ComfyUI"  # whose names of layers the digests are over; diffusers' are others


def identity(model) -> str:
    """A hash of all that decides MODEL's answers: weights, LoRA-like patches with strengths, what else it `carried`.

    It is the same whether the host has the patches in the weights at the moment or not. Without patches it is the
    `digests.fingerprint` of the network.
    """
    digest = _weights_digest(model)
    for name, patches in sorted(model.patches.items()):
        for strength, patch, strength_model, *_ in patches:
            digest.update(f"{name} {strength} {strength_model}".encode())
            _add_patch(digest, patch)
    for thing in carried(model):
        digest.update(thing.spelled.encode())
    return digest.hexdigest()[:16]


def weights_identity(model) -> str:
    """A hash of MODEL's weights as they were loaded, without any patch."""
    return _weights_digest(model).hexdigest()[:16]


def loras_below(model) -> list[LoraBelow]:
    """What is patched into MODEL's weights, in the order in which it was: one entry for each LoRA that was loaded.

    The host keeps patches by layer; those of one file share the set of keys that was read. Merged models and other
    patches without such a set count as one entry by their strength. The last file's metadata may say its name.
    """
    groups: dict[Any, list[tuple[str, float, Any]]] = {}
    for name, patches in sorted(model.patches.items()):
        for strength, patch, strength_model, *_ in patches:
            keys = getattr(patch, "loaded_keys", None)
            group = (strength, strength_model) if keys is None else (id(keys), strength)
            groups.setdefault(group, []).append((name, strength, patch))
    found = [_lora_below(entries) for entries in groups.values()]
    metadata = model.attachments.get("lora_metadata") or {}
    named = next((metadata[key] for key in NAME_KEYS if metadata.get(key)), "")
    return [*found[:-1], {**found[-1], "name": named}] if named and len(found) == 1 else found


def _lora_below(entries: list[tuple[str, float, Any]]) -> LoraBelow:
    digest = hashlib.sha256()
    for name, _, patch in entries:
        digest.update(name.encode())
        _add_patch(digest, patch)
    return {"digest": digest.hexdigest()[:16], "strength": entries[0][1], "layers": len(entries)}


def _weights_digest(model) -> hashlib._Hash:
    digest = hashlib.sha256()
    for name, value in sorted(stored_weights(model.model).items()):
        if name.startswith(NETWORK):
            saved = model.backup.get(name)
            digest_tensor(digest, name.removeprefix(NETWORK), value if saved is None else saved.weight)
    return digest


def _add_patch(digest: hashlib._Hash, patch: Any) -> None:
    for value in itertools.islice(_values(getattr(patch, "weights", patch)), 64):
        if isinstance(value, Tensor):
            digest_tensor(digest, "", value)
        elif isinstance(value, float):  # a LoRA's alpha
            digest.update(f"{value:g}".encode())


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _values(part)
    else:
        yield value
