"""The commands ``adapter`` and ``merge``: LoRA files that belong to a turbo model."""

from __future__ import annotations

import argparse

from ..lora_files import read_lora, save_lora
from ..methods.adapter import AdapterConfig
from ..models.lora_stack import joined
from ..models.pipelines import open_source
from ..training.config import load_config
from .train import train_student, training_config
from .turbo import find_turbo, make_kept


def run_adapter(args: argparse.Namespace) -> None:
    """Samples of the turbo in OUT/kept, then the adapter that is learnt from them, OUT/adapter.safetensors."""
    config = training_config(args)
    source = open_source(config.model, config.cache.embedded_guidance)
    turbo = find_turbo(config, source, (source.channels, *config.cache.sizes[0]))
    kept = make_kept(config, source, turbo, config.cache.sizes, args.out / "kept")
    method = AdapterConfig(student_sigmas=tuple(turbo.sigmas[:-1].tolist()))
    train_student(config, source, kept, args.out / "adapter.safetensors", turbo, method=method)


def run_merge(args: argparse.Namespace) -> None:
    """One LoRA file of a student and of what it was trained above. Raises ValueError for one that was not."""
    config = load_config(args.config)
    if not config.model.loras:
        raise ValueError("[model] loras names no LoRA, so there is nothing to merge the student with")
    state, description = read_lora(args.lora)
    if description.get("weights") == "differences":
        raise ValueError(f"{args.lora} holds differences of all weights, not a LoRA: load it above the LoRAs instead")
    backend = open_source(config.model).backend
    said = {lora["digest"] for lora in description.get("below", ())}
    strangers = [lora.name for lora in backend.below if lora.digest not in said]
    if strangers or len(said) != len(backend.below):
        raise ValueError(
            f"{args.lora} was trained above {len(said)} LoRAs, and [model] loras has others"
            + (f" ({', '.join(strangers)})" if strangers else "")
        )
    whole = {name: value for name, value in description.items() if name not in ("format", "below")}
    save_lora(args.out, joined(state, backend.below, backend.architecture.lora_prefix), whole)
    print(f"{args.out} is the student with {', '.join(lora.name for lora in backend.below)}: load it alone")
