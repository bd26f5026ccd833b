"""ComfyUI's own trainer, the node TrainLoraNode, as the benchmarks call it."""

from __future__ import annotations

from typing import Any


def core_settings(batch_size: int, steps: int, rank: int, **changes: Any) -> dict[str, list]:
    """The node's widgets as the host gives them, each a list: its own defaults but for these."""
    settings = dict(
        batch_size=batch_size,
        steps=steps,
        grad_accumulation_steps=1,
        learning_rate=0.0005,
        rank=rank,
        optimizer="AdamW",
        loss_function="MSE",
        seed=0,
        training_dtype="bf16",
        lora_dtype="bf16",
        quantized_backward=False,
        algorithm="LoRA",
        gradient_checkpointing=True,
        checkpoint_depth=1,
        offloading=False,
        existing_lora="[None]",
        bucket_mode=False,
        bypass_mode=False,
    )
    return {name: [value] for name, value in (settings | changes).items()}
