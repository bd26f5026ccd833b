"""What a distillation of a large model will need, in words for a workflow's note. All of it is estimated.

Memory: counted on fake tensors of full size, one training step with Adam's moments, plus 1.2 GiB for CUDA itself.
Time: network calls x operations of one call / what such a card does in half precision in practice.
"""

from __future__ import annotations

from dataclasses import dataclass

SPEED = {12: 20.0, 16: 40.0, 24: 70.0}  # GB of a card's memory: TFLOP a second (as an RTX 3060, 4070 Ti Super, 4090)
PASSES = 6.0  # forwards that one item of a training step costs, with checkpointing: 4.55 without (README)
GUIDED = 2.0  # more, of a guided teacher in the distillation term


@dataclass(frozen=True)
class Needs:
    """One workflow on its model.

    forward: TFLOP of one network call on one item.  memory: GiB that training takes as the workflow is set.
    cards: what to do on a card, by its GB; a card that is left out cannot do it.
    dataset, checkpoint, lora: GB on disk.
    """

    forward: float
    memory: float
    cards: dict[int, str]
    dataset: float
    checkpoint: float
    lora: float


def hours(needs: Needs, teacher: dict | None, training: dict) -> dict[int, tuple[float, float]]:
    """Card -> hours of Teacher Latents and of the trainer. teacher, training: the inputs of the two nodes; None where
    nothing is sampled."""
    calls = 0 if teacher is None else teacher["count"] * teacher["steps"] * (2 if teacher["cfg"] > 1 else 1)
    forwards = PASSES + (GUIDED if training.get("distillation_weight") else 0)
    passes = training["steps"] * training["batch_size"] * training.get("accumulation", 1) * forwards
    return {
        card: (calls * needs.forward / speed / 3600, passes * needs.forward / speed / 3600)
        for card, speed in SPEED.items()
        if card in needs.cards
    }


def in_words(needs: Needs, teacher: dict | None, training: dict) -> str:
    """Hours, memory and disk for cards of 12, 16 and 24 GB, as a list in Markdown."""
    took = hours(needs, teacher, training)
    lines = ["### What it needs (estimated, not measured)", ""]
    for card in SPEED:
        if card in took:
            sampling, trained = took[card]
            first = "" if teacher is None else f"{_round(sampling)} for the latents, then "
            lines.append(f"- **{card} GB card**: {needs.cards[card]}. About {first}{_round(trained)} of training.")
        else:
            lines.append(f"- **{card} GB card**: does not fit.")
    lines += [
        f"- Memory while training, as set here: {needs.memory:g} GiB.",
        f"- Disk: dataset {needs.dataset:g} GB, checkpoint {needs.checkpoint:g} GB, LoRA {needs.lora:g} GB.",
    ]
    return "\n".join(lines)


def _round(hours: float) -> str:
    return f"{hours:.0f} hours" if hours >= 1.5 else f"{max(hours * 60, 5):.0f} minutes"


NEEDS = {
    "distil_sdxl_fine_tune": Needs(
        6.0,
        12.5,
        {12: "set the trainer's batch_size to 2 and rank to 16", 16: "as it is", 24: "as it is"},
        2.0,
        2.7,
        0.7,
    ),
    "distil_sd3.5_medium": Needs(
        12.0, 12.4, {12: "set batch_size to 2; it fits barely", 16: "as it is", 24: "as it is"}, 6.0, 2.1, 0.5
    ),
    "distil_flux1_dev": Needs(
        60.0,
        33.6,
        {24: "set weight_dtype of Load Diffusion Model to fp8_e4m3fn and rank to 16 (19 GiB)"},
        9.5,
        4.9,
        1.4,
    ),
    "distil_sdxl_add": Needs(
        1.5, 11.0, {12: "set batch_size to 2 and rank to 16", 16: "as it is", 24: "as it is"}, 1.5, 2.9, 0.7
    ),
    "tune_z_image_turbo": Needs(
        31.0,
        20.0,
        {16: "set weight_dtype of Load Diffusion Model to fp8_e4m3fn; it fits barely", 24: "as it is"},
        1.3,
        0.4,
        0.1,
    ),
    "tune_flux1_schnell": Needs(
        60.0, 30.0, {24: "set weight_dtype of Load Diffusion Model to fp8_e4m3fn"}, 0.8, 0.8, 0.2
    ),
    "tune_sdxl_turbo": Needs(1.5, 8.6, {12: "as it is", 16: "as it is", 24: "as it is"}, 0.1, 0.9, 0.3),
    "distil_sdxl_inpainting": Needs(
        6.0, 13.2, {12: "set batch_size to 2 and rank to 16", 16: "as it is", 24: "as it is"}, 0.1, 2.7, 0.7
    ),
    "distil_flux1_fill": Needs(
        60.0,
        36.0,
        {24: "set weight_dtype of Load Diffusion Model to fp8_e4m3fn and rank to 16 (21.5 GiB); it fits barely"},
        0.2,
        4.9,
        1.4,
    ),
    "distil_flux1_kontext": Needs(
        165.0,
        30.2,
        {24: "set *offload* of Training Settings to *ram* (19.5 GiB, and 12 GB of the host's memory)"},
        3.1,
        4.9,
        1.4,
    ),
    "distil_qwen_image_edit": Needs(
        260.0,
        42.3,
        {
            24: "set the trainer's rank to 16 and *offload* of Training Settings to *ram* (17.3 GiB, and 20 GB of the "
            "host's memory)"
        },
        1.7,
        7.1,
        2.4,
    ),
    "distil_sd15_inpainting": Needs(0.8, 4.3, {12: "as it is", 16: "as it is", 24: "as it is"}, 0.1, 0.5, 0.1),
    "distil_sd1.5_diffusion2gan": Needs(0.8, 4.7, {12: "as it is", 16: "as it is", 24: "as it is"}, 8.0, 0.5, 0.1),
}
