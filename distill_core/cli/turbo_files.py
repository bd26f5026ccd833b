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
    """One LoRA file of a student, of what it was trained above, and of one to add. Raises ValueError for a student that
    was trained above others, and for a LoRA that does not fit the model."""
    config = load_config(args.config)
    if not config.model.loras and not args.add:
        raise ValueError("[model] loras names no LoRA, so there is nothing to merge the student with; --add names one")
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
    others, whole = list(backend.below), {k: v for k, v in description.items() if k not in ("format", "below")}
    if args.add:
        added = backend.read_lora(str(args.add))
        others.append(added.weighted(args.weight))
        whole["added"] = [*description.get("added", ()), added.below() | {"strength": args.weight}]
    save_lora(args.out, joined(state, others, backend.architecture.lora_prefix), whole)
    print(f"{args.out} is the student with {', '.join(lora.name for lora in others)}: load it alone")
