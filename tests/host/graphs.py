"""Workflows in API format that several tests queue: the mini model distilled in the graph."""

from __future__ import annotations


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def mini_dataset(name: str, **teacher) -> dict:
    """The mini model without a shift, its conditionings, and a dataset of a few of its latents; None: not connected."""
    settings = dict(
        model=["teacher", 0], positive=["classes", 0], negative=["none", 0],
        dataset_name=name, count=64, sizes="64x64", steps=4, cfg=1.5, pairs_for_steps=1, batch_size=64, dtype="float32"
    )  # fmt: skip
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "teacher": node("ModelSamplingSD3", model=["mini", 0], shift=1.0),
        "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
        "none": node("TurboDistillMiniConditioning", class_name="none"),
        "dataset": node(
            "TurboDistillTeacherLatents", **{k: v for k, v in (settings | teacher).items() if v is not None}
        ),
    }


def mini_training(run_name: str, dataset: str = "few", teacher: dict | None = None, **trainer) -> dict:
    """`mini_dataset` -> LADD Trainer -> Save Turbo LoRA; a few quick steps unless ``trainer`` says otherwise."""
    settings = dict(
        run_name=run_name, target_steps=1, steps=4, batch_size=8, student_lr=6e-4, discriminator_lr=4e-3, rank=4,
        renoise_mean=0.0, renoise_std=1.0, sampler="ancestral", gradient_checkpointing=False,
    )  # fmt: skip
    return mini_dataset(dataset, **(teacher or {})) | {
        "train": node(
            "TurboDistillLADDTrainer", model=["teacher", 0], dataset=["dataset", 0], **(settings | trainer)
        ),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{run_name}"),
    }  # fmt: skip
