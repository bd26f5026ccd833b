"""Files on disk: written to a temporary name and renamed, safetensors and JSON only, self-describing.

A reader finds either the previous file or the complete new one, whatever happens to the writing process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMESPACE = "turbo_distill."
LORA_FORMAT = "1"
SAMPLES, SAMPLE_BYTES = 16, 4096  # of `file_digest`


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; its bytes are on the disk before the old file is replaced.

    Raises OSError when it cannot be written (a full disk); the old file is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, content) -> None:
    """Write JSON atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError for a missing, truncated or foreign file.

    The tensors are copies: views of the mapped file would keep it open, and Windows does not replace open files.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); delete it and make it again, or restore a copy"
        ) from error


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


def fingerprint(network: nn.Module) -> str:
    """The `weights_digest` of a network, to recognise a base model."""
    return weights_digest(network.state_dict())


def file_digest(path: str | Path) -> str:
    """A hash of a file's size and of `SAMPLES` pieces of it, evenly spaced from start to end: quick for any size."""
    digest, size = hashlib.sha256(), os.path.getsize(path)
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def save_lora(path: str | Path, state: dict[str, Tensor], description: dict) -> None:
    """A LoRA in diffusers' key layout with ``turbo_distill.*`` metadata.

    description: method, sigmas (student levels), sampler, sampler_options, cfg, prediction, family, base
    (fingerprint), steps, config.
    Every value becomes a string; what is not one is written as JSON.
    """
    description = {"format": LORA_FORMAT, **description}
    texts = {NAMESPACE + k: v if isinstance(v, str) else json.dumps(v) for k, v in description.items()}
    save_tensors(path, state, {"format": "pt", **texts})


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """State and description of a LoRA written by `save_lora`. Raises ValueError for another kind of file."""
    state, metadata = load_tensors(path)
    description = {k.removeprefix(NAMESPACE): v for k, v in metadata.items() if k.startswith(NAMESPACE)}
    if "sigmas" not in description:
        raise ValueError(f"{path} carries no turbo_distill metadata; it was not written by this project")
    for name in ("sigmas", "sampler_options", "cfg", "steps", "config"):
        if name in description:
            description[name] = json.loads(description[name])
    return state, description


def git_commit() -> str:
    """The commit of this source tree, or "unknown" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
