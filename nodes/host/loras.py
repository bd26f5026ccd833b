"""Which turbo LoRAs are on a MODEL, whatever was loaded after them.

The host keeps the metadata of the last LoRA only, and that even if none of its weights fitted. But a MODEL also holds
the LoRAs' tensors, so a file of the LoRA folders is recognised by its own.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import comfy.lora
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open

from ...distill_core.presets.facts import TurboLora
from ...distill_core.presets.recipe import describe_metadata
from .folders import lora_files

# Endings of the tensor that is compared, in files that `lora_keys` writes, and where a loaded patch keeps it.
ENDINGS = (".lora_B.weight", ".lora_up.weight", ".diff")
LAST = "the last LoRA"  # of which the host knows no more than its metadata
METADATA = "lora_metadata"  # the host's name for what the last LoRA's file says


def turbo_loras(model: ModelPatcher) -> tuple[TurboLora, ...]:
    """The turbo LoRAs on a MODEL, and the last one loaded even if nothing of it fitted (``layers`` is 0 then).

    Only files that this project wrote say what they are. One that is no longer in a LoRA folder is known only while its
    metadata is the last.
    """
    attached = model.attachments.get(METADATA) or {}
    files = _turbo_files() if model.patches or describe_metadata(attached) else []
    names = comfy.lora.model_lora_keys_unet(model.model, {}) if files and model.patches else {}
    loras = [TurboLora(name, metadata, *_taken_up(model, path, names)) for name, path, metadata in files]
    found = [lora for lora in loras if lora.layers]
    if "sigmas" in describe_metadata(attached) and all(lora.metadata != attached for lora in found):
        known = next((lora for lora in loras if lora.metadata == attached), None)
        found.append(known or TurboLora(LAST, dict(attached), len(model.patches), 1.0))
    return tuple(found)


def _turbo_files() -> list[tuple[str, Path, dict[str, str]]]:
    files = []
    for name in lora_files():
        path = folder_paths.get_full_path("loras", name)
        if path and name.endswith(".safetensors"):
            state = Path(path).stat()
            metadata = _metadata(path, state.st_mtime_ns, state.st_size)
            if "sigmas" in describe_metadata(metadata):
                files.append((name, Path(path), metadata))
    return files


@lru_cache(maxsize=4096)
def _metadata(path: str, changed: int, size: int) -> dict[str, str]:
    """The header of a file; ``changed`` and ``size`` tell when to read it again."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # not ours to complain about: nobody asked for this file


def _taken_up(model: ModelPatcher, path: Path, names: dict) -> tuple[int, float]:
    """How many layers of a file are on the model, and with which strength. names: the host's, of LoRA layers."""
    try:
        with safe_open(path, "pt") as file:
            layers = [(name, end) for key in file.keys() for name, end in _split(key) if name in names]
            for name, end in layers[:1]:
                strength = _strength(model, names[name], file.get_tensor(name + end))
                if strength is not None:
                    return len(layers), strength
    except (OSError, SafetensorError):
        pass  # removed since it was listed
    return 0, 0.0


def _split(key: str) -> list[tuple[str, str]]:
    return [(key.removesuffix(end), end) for end in ENDINGS if key.endswith(end)]


def _strength(model: ModelPatcher, target: str | tuple, tensor: torch.Tensor) -> float | None:
    """The strength of the patch on a weight that holds this tensor; None if none does."""
    weight = target if isinstance(target, str) else target[0]
    for strength, value, *_ in model.patches.get(weight, ()):
        held = value[1] if isinstance(value, tuple) else getattr(value, "weights", ())
        kept = held[0] if len(held) else None
        if isinstance(kept, torch.Tensor) and kept.shape == tensor.shape and torch.equal(kept.cpu(), tensor):
            return float(strength)
    return None
