"""Where the pack writes its files: all inside the host's output folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...distill_core.training.run import folder_in


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
