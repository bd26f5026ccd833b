"""Model folders of diffusers on disk: the network and its noise process as a backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess, cumulative_alphas, zero_terminal_snr
from ...errors import opening
from ...files import read_json
from ..items import REFERENCE
from .diffusers import ARCHITECTURES, DiffusersBackend, Network

BY_REFERENCE = ("FluxKontextPipeline",)  # pipelines that show the network a picture as further tokens
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # files of diffusers and transformers


def load_backend(
    folder: str | Path, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False, weights: bool = True
) -> DiffusersBackend:
    """A backend from a diffusers model folder on disk (``transformer`` or ``unet``, with ``scheduler`` beside it).

    The scheduler's config gives the prediction type, the alphas or the shift. Nothing is downloaded.
    weights False: only the network's config is read, and its weights are on the meta device.
    Raises ValueError when there is no supported network in the folder.
    """
    import diffusers

    root = Path(folder)
    candidates = [root / name for name in ("transformer", "unet") if (root / name / "config.json").exists()]
    network_folder = candidates[0] if candidates else root
    if not (network_folder / "config.json").exists():
        raise ValueError(f"no diffusers model in {root}: expected transformer/config.json or unet/config.json")
    class_name = read_json(network_folder / "config.json", "download the model again").get("_class_name")
    if class_name not in ARCHITECTURES:
        raise ValueError(f"{network_folder} holds a {class_name}; known: {', '.join(ARCHITECTURES)}")
    variant = only_variant([network_folder]) if weights else None
    options = {"torch_dtype": dtype, "local_files_only": True, "variant": variant}
    with opening(network_folder, f"a {class_name}"):
        kind = getattr(diffusers, class_name)
        network = kind.from_pretrained(network_folder, **options) if weights else unloaded(kind, network_folder)
    scheduler = root / "scheduler" / "scheduler_config.json"
    process = None
    if scheduler.exists():
        with opening(scheduler, "a scheduler's settings"):
            process = process_from_scheduler(read_json(scheduler), class_name)
    return DiffusersBackend(network, process, gradient_checkpointing, items_of_pipeline(root))


def items_of_pipeline(root: Path) -> tuple[str, ...] | None:
    """Per-item tensors of a pipeline whose network does not tell them; None where it does."""
    index = root / "model_index.json"
    kind = read_json(index, "download the pipeline again").get("_class_name") if index.exists() else None
    return (REFERENCE,) if kind in BY_REFERENCE else None


def unloaded(kind: Any, folder: Path) -> Network:
    """A model of diffusers as its config describes it, its weights on the meta device."""
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder, local_files_only=True))


def only_variant(folders: Sequence[Path]) -> str | None:
    """The variant ("fp16") in which one of the folders has its weights, where it has no plain ones; None for none."""
    for folder in folders:
        names = [path.name.split(".") for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
        variants = {parts[1].split("-")[0] for parts in names if len(parts) > 2 and parts[0] in WEIGHT_NAMES}
        if variants and not any(parts[0].split("-")[0] in WEIGHT_NAMES and len(parts) == 2 for parts in names):
            return "fp16" if "fp16" in variants else min(variants)
    return None


def process_from_scheduler(config: dict, class_name: str = "") -> NoiseProcess:
    """The noise process that a diffusers scheduler config describes (flow, eps or v; zero terminal SNR)."""
    if "Flow" in config.get("_class_name", ""):
        usual = ARCHITECTURES[class_name].default_process() if class_name in ARCHITECTURES else FlowProcess()
        multiplier = getattr(usual, "timestep_multiplier", 1000.0)
        # With dynamic shifting `shift` is unused and mu grows with the resolution; max_shift is its value at 1024 px.
        dynamic = config.get("use_dynamic_shifting", False)
        return FlowProcess(multiplier, math.exp(config.get("max_shift", 1.15)) if dynamic else config.get("shift", 1.0))
    alphas = cumulative_alphas(
        config.get("beta_schedule", "scaled_linear"),
        config.get("beta_start", 0.00085),
        config.get("beta_end", 0.012),
        config.get("num_train_timesteps", 1000),
    )
    if config.get("rescale_betas_zero_snr"):
        alphas = zero_terminal_snr(alphas)
    prediction = {"epsilon": "eps", "v_prediction": "v"}.get(config.get("prediction_type", "epsilon"))
    if prediction is None:
        raise ValueError(f"prediction type {config['prediction_type']!r} is not supported; use epsilon or v_prediction")
    return DiscreteProcess(alphas, prediction)
