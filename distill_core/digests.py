"""Short hashes that recognise weights and files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

SAMPLES, SAMPLE_BYTES = 16, 4096  # of `file_digest`


def digest_tensor(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    """Add a tensor's name, shape and first values to a hash.

    The values count as bfloat16, so that weights loaded in float32 and in bfloat16 are the same ones.
    """
    digest.update(f"{name}{tuple(value.shape)}".encode())
    digest.update(value.detach().flatten()[:16].bfloat16().float().cpu().numpy().tobytes())


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and first values of tensors, to recognise weights; see `digest_tensor`."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest_tensor(digest, name, value)
    return digest.hexdigest()[:16]


def stored_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network, each entry as it lies in memory.

    Layers of some loaders (GGUF) show empty stand-ins on the meta device in their place, for the size alone: those are
    the parameters themselves here, and what has no parameter behind it is left out.
    """
    parameters = dict(network.named_parameters())
    stored = {name: parameters.get(name) if value.is_meta else value for name, value in network.state_dict().items()}
    return {name: value for name, value in stored.items() if value is not None}


def fingerprint(network: nn.Module) -> str:
    """The `weights_digest` of a network, to recognise a base model."""
    return weights_digest(stored_weights(network))


def file_digest(path: str | Path) -> str:
    """A hash of a file's size and of `SAMPLES` pieces of it, evenly spaced from start to end: quick for any size."""
    digest, size = hashlib.sha256(), os.path.getsize(path)
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
