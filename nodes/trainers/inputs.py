"""The inputs that trainer nodes share. What is also a setting of the core says so in the core's words."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...distill_core.diffusion.samplers import SAMPLERS
from ...distill_core.methods.config import MethodConfig
from ...distill_core.methods.defaults import MOST_STEPS, NO_PRESET
from ...distill_core.models.strengths import StrengthsConfig
from ...distill_core.presets.recipe import AUTO
from ...distill_core.presets.table import presets
from ...distill_core.settings import help_of
from ...distill_core.training.loop_config import TrainConfig
from ...distill_core.training.student import StudentConfig
from ..common import OF_PRESET, setting_input
from ..datasets import Dataset

LORA, ALL_WEIGHTS = "LoRA", "all weights"
GO_ON, START_AGAIN = "go on", "start again"
FAMILYS = "0 takes the starting value of the model's family."


def task_inputs(dataset: str, target_steps: int) -> list:
    """What every run needs. dataset: which datasets serve.  target_steps: its default."""
    return [
        io.Model.Input(
            "model", tooltip="The teacher, including its LoRAs and ModelSampling patches. It is never modified."
        ),
        Dataset.Input("dataset", tooltip=dataset),
        run_name_input("my_turbo"),
        io.Int.Input(
            "target_steps",
            default=target_steps,
            min=1,
            max=MOST_STEPS,
            tooltip="Number of sampling steps that the student is trained for.",
        ),
        steps_input(2000),
    ]


def run_name_input(default: str) -> io.String.Input:
    return io.String.Input(
        "run_name",
        default=default,
        tooltip="Name of the run: its folder is output/turbo_distill/runs/NAME, its LoRA "
        "output/loras/turbo_distill/NAME.safetensors. The same name with the same settings resumes a stopped run. "
        "Other settings need another name, or existing_run.",
    )


def steps_input(default: int) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000000, tooltip=help_of(TrainConfig, "steps"))


def loop_without_discriminator() -> list:
    """`loop_inputs` of a method that has none."""
    return [entry for entry in loop_inputs() if not entry.id.startswith("discriminator")]


def loop_inputs(discriminator: bool = True) -> list:
    """What decides how long and how fast it learns. discriminator: whether its rate is shown at first."""
    rate = dict(default=0.0, min=0.0, max=1.0, step=1e-6, round=1e-7)
    hidden = {} if discriminator else {"advanced": True}
    return [
        setting_input(io.Int, TrainConfig, "batch_size", default=4),
        setting_input(
            io.Int,
            TrainConfig,
            "accumulation",
            "A larger batch in the memory of a smaller one.",
            default=1,
            advanced=True,
        ),
        setting_input(io.Float, TrainConfig, "student_lr", FAMILYS, **rate),
        setting_input(io.Float, TrainConfig, "discriminator_lr", FAMILYS, **rate, **hidden),
        setting_input(io.Int, TrainConfig, "discriminator_updates", default=1, min=1, max=20, advanced=True),
        setting_input(
            io.Float, TrainConfig, "ema_decay", default=0.99, min=0.0, max=0.9999, step=0.001, round=1e-4, advanced=True
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Recompute each block in the backward pass, which takes far less memory. Off is faster where there "
            "is memory to spare.",
        ),
        setting_input(io.Combo, TrainConfig, "precision", default="auto", advanced=True),
        setting_input(
            io.Int, TrainConfig, "seed", default=0, control_after_generate=io.ControlAfterGenerate.fixed, advanced=True
        ),
        setting_input(io.Int, TrainConfig, "checkpoint_every", default=250, min=1, max=100000, advanced=True),
    ]


def weight_input(name: str, default: float, tooltip: str, **options: Any) -> io.Float.Input:
    """The weight of a term of the student's loss."""
    shared = dict(min=0.0, max=1000.0, step=0.1, optional=True)
    return io.Float.Input(name, default=default, tooltip=tooltip, **shared, **options)


def teacher_cfg_input(term: str = "the distillation term") -> io.Float.Input:
    """The guidance of the teacher in a term of the student's loss."""
    return io.Float.Input(
        "teacher_cfg",
        default=0.0,
        min=0.0,
        max=30.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip=f"The teacher's guidance in {term}. 0: that of the dataset, which is cfg of Teacher Latents, or 1 for "
        "real images.",
    )


def strengths_inputs() -> list:
    """Of a student that edits pictures: whether it is told the strengths of its items."""
    return [
        io.Boolean.Input(
            "strengths_told",
            default=False,
            optional=True,
            advanced=True,
            tooltip="For models that edit, on a dataset of Teacher Edits: the student is told the text and image "
            "strength of each item, so that Editing Strengths turns both when it samples.",
        ),
        *(
            io.Float.Input(
                f"usual_{name}_strength",
                default=usual,
                min=0.0,
                max=100.0,
                step=0.1,
                optional=True,
                advanced=True,
                tooltip=f"With strengths_told: the {name} strength that the student has without Editing Strengths, and "
                "in other programs. Inside of the range of the dataset.",
            )
            for name, usual in (("text", StrengthsConfig.text), ("image", StrengthsConfig.image))
        ),
    ]


def teacher_input() -> io.Model.Input:
    """Another teacher than the model."""
    return io.Model.Input(
        "teacher_model",
        optional=True,
        tooltip="Another teacher than model: the same model with one LoRA more, or another checkpoint or size with the "
        "same latents and text encoders. Only a LoRA more takes no second copy in memory. Not connected: model is the "
        "teacher.",
    )


def loss_input(default: str, of: str) -> Any:
    """The adversarial loss. of: whose choice the default is."""
    return setting_input(
        io.Combo,
        MethodConfig,
        "gan_loss",
        f"{of} uses {default}. nonsaturating also works with a batch of 1.",
        "loss",
        default=default,
        advanced=True,
    )


def r1_input(config: type[MethodConfig], default: float, more: str = "") -> Any:
    """The gradient penalty of a method."""
    return setting_input(
        io.Float, config, "r1", more, default=default, min=0.0, max=1000.0, step=1e-5, round=1e-7, advanced=True
    )


def student_inputs() -> list:
    """What the student is, and how it is to be sampled."""
    return [
        io.Combo.Input(
            "preset",
            options=[AUTO, NO_PRESET, *presets()],
            default=AUTO,
            optional=True,
            advanced=True,
            tooltip="Train at the noise levels of a known turbo model, so that the student is sampled like it. auto: "
            "those of the model itself if it is a turbo, else none. none: evenly spaced levels.",
        ),
        setting_input(
            io.Combo,
            StudentConfig,
            "sampler",
            "Without a preset it is renoise (LADD). ancestral keeps more variety in 2-4 steps on the mini model.",
            options=[OF_PRESET, *SAMPLERS],
            default=OF_PRESET,
            advanced=True,
        ),
        io.Combo.Input(
            "train",
            options=[LORA, ALL_WEIGHTS],
            default=LORA,
            optional=True,
            tooltip="LoRA: a small file and one copy of the model in memory. all weights: full fine-tuning of a second "
            "copy, which takes about 20 bytes more for each weight, and a file of 4 bytes a weight.",
        ),
        *lora_inputs(),
    ]


def lora_inputs() -> list:
    """What the student's LoRA is."""
    return [
        io.Int.Input(
            "rank", default=0, min=0, max=1024, optional=True, tooltip=f"Rank of the student's LoRA. {FAMILYS}"
        ),
        setting_input(
            io.String,
            StudentConfig,
            "targets",
            "Several are separated by commas.",
            "lora_targets",
            default="",
            advanced=True,
        ),
    ]


def preview_inputs(vae: bool) -> list:
    """Pictures while it trains. vae: whether the VAE is for nothing else."""
    own_vae = io.Vae.Input(
        "vae", optional=True, tooltip="Decodes the pictures shown during training and in the report."
    )
    return [
        *([own_vae] if vae else []),
        io.Conditioning.Input(
            "preview_positive", optional=True, tooltip="Prompts of the preview pictures: one, or a list."
        ),
        io.Conditioning.Input(
            "preview_negative", optional=True, tooltip="Negative prompt of the guided teacher in the report."
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=100000,
            optional=True,
            advanced=True,
            tooltip="Training steps between preview pictures on the node; needs a VAE and preview_positive. 0 shows "
            "the curves only.",
        ),
    ]


def existing_run_input() -> io.Combo.Input:
    """What to do with a run that is there."""
    return io.Combo.Input(
        "existing_run",
        options=[GO_ON, START_AGAIN],
        default=GO_ON,
        optional=True,
        tooltip="If there is a run of this name. go on: resume it, or answer with it if it is finished. start again: "
        "call it, and its LoRA, NAME_old1 and begin at step 0. A finished run with just these settings is not done "
        "again.",
    )
