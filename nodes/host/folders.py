"""Where the pack writes its files: all inside the host's output folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...distill_core.training.run_folder import folder_in


def _root(*parts: str) -> Path:
    return Path(folder_paths.get_output_directory(), *parts)


def dataset_folder(name: str) -> Path:
    """output/turbo_distill/datasets/NAME. Raises ValueError for a name that is no plain folder name."""
    return folder_in(_root("turbo_distill", "datasets"), name, "dataset name")


def run_folder(name: str) -> Path:
    """output/turbo_distill/runs/NAME. Raises ValueError for a name that is no plain folder name."""
    return folder_in(_root("turbo_distill", "runs"), name)


def lora_file(run_name: str) -> Path:
    """The student of a run, where the host's LoRA loaders look: output/loras/turbo_distill/NAME.safetensors."""
    return _root("loras", "turbo_distill") / f"{run_folder(run_name).name}.safetensors"


def lora_files() -> list[str]:
    """The LoRAs that the host's loaders list."""
    try:
        return folder_paths.get_filename_list("loras")
    except FileNotFoundError:  # a folder that the host had listed is gone: it looks again
        folder_paths.filename_list_cache.pop("loras", None)
        return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> str:
    """Where one of them lies. Raises ValueError for a name that is not listed."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"there is no LoRA {name!r} in models/loras or output/loras")
    return path
