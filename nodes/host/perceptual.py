"""Weights of the perceptual metric where the host keeps models, loaded on its device."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths
import torch

from ...distill_core.perceptual import ELatentLPIPS, load_metric

SHIPPED = "mini model (shipped)"


def weight_files() -> dict[str, Path | None]:
    """Names of the metric's weights: None for the shipped ones, a path for each file in models/perceptual."""
    folder = Path(folder_paths.models_dir) / "perceptual"
    return {SHIPPED: None} | {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*.safetensors"))}


def load_perceptual(weights: str, transforms: str, draws: int, l1: float) -> ELatentLPIPS:
    """The metric with the weights of that name. Raises ValueError if there are none."""
    files = weight_files()
    if weights not in files:
        raise ValueError(f"{weights} is no longer in models/perceptual; choose another file")
    # A trainer differentiates through it, which tensors made in the host's inference mode do not allow.
    with torch.inference_mode(False):
        metric = load_metric(files[weights], preset=transforms, draws=draws, l1=l1)
        return metric.to(comfy.model_management.get_torch_device())
