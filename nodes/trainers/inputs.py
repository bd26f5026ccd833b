"""The inputs that trainer nodes share. What is also a setting of the core says so in the core's words."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...distill_core.diffusion.samplers import SAMPLERS
from ...distill_core.methods.config import MethodConfig
from ...distill_core.methods.defaults import MOST_STEPS, NO_PRESET
from ...distill_core.methods.losses import GAN_LOSSES
from ...distill_core.presets.table import presets
from ...distill_core.settings import help_of
from ...distill_core.training.loop import PRECISIONS, TrainConfig
from ...distill_core.training.run import StudentConfig
from ..common import OF_PRESET, SEED_MAX
from ..datasets import Dataset

LORA, ALL_WEIGHTS = "LoRA", "all weights"
FAMILYS = "0 takes the starting value of the model's family."


def setting_input(kind: Any, config: type, name: str, more: str = "", widget: str = "", **options: Any) -> Any:
    """An optional input for a setting of the core, with the setting's words. ``more`` is said after them."""
    words = " ".join([help_of(config, name), more]).strip()
    return kind.Input(widget or name, optional=True, tooltip=words, **options)


def task_inputs(dataset: str, target_steps: int) -> list:
    """What every run needs. dataset: which datasets serve.  target_steps: its default."""
    return [
        io.Model.Input(
            "model", tooltip="The teacher, including its LoRAs and ModelSampling patches. It is never modified."
        ),
        Dataset.Input("dataset", tooltip=dataset),
        io.String.Input(
            "run_name",
            default="my_turbo",
            tooltip="Name of the run: its folder is output/turbo_distill/runs/NAME, its LoRA "
            "output/loras/turbo_distill/NAME.safetensors. The same name with the same settings resumes a stopped run. "
            "Other settings need another name.",
        ),
        io.Int.Input(
            "target_steps",
            default=target_steps,
            min=1,
            max=MOST_STEPS,
            tooltip="Number of sampling steps that the student is trained for.",
        ),
        io.Int.Input("steps", default=2000, min=1, max=1000000, tooltip=help_of(TrainConfig, "steps")),
    ]


def loop_inputs() -> list:
    """What decides how long and how fast it learns."""
    rate = dict(default=0.0, min=0.0, max=1.0, step=1e-6, round=1e-7)
    return [
        setting_input(io.Int, TrainConfig, "batch_size", default=4, min=1, max=4096),
        setting_input(
            io.Int,
            TrainConfig,
            "accumulation",
            "A larger batch in the memory of a smaller one.",
            default=1,
            min=1,
            max=1024,
            advanced=True,
        ),
        setting_input(io.Float, TrainConfig, "student_lr", FAMILYS, **rate),
        setting_input(io.Float, TrainConfig, "discriminator_lr", FAMILYS, **rate),
        setting_input(io.Int, TrainConfig, "discriminator_updates", default=1, min=1, max=20, advanced=True),
        setting_input(
            io.Float, TrainConfig, "ema_decay", default=0.99, min=0.0, max=0.9999, step=0.001, round=1e-4, advanced=True
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            optional=True,
            tooltip="Recompute each block in the backward pass, which takes far less memory. Off is faster where there "
            "is memory to spare.",
        ),
        setting_input(io.Combo, TrainConfig, "precision", options=list(PRECISIONS), default="auto", advanced=True),
        setting_input(
            io.Int,
            TrainConfig,
            "seed",
            default=0,
            min=0,
            max=SEED_MAX,
            control_after_generate=io.ControlAfterGenerate.fixed,
        ),
        setting_input(io.Int, TrainConfig, "checkpoint_every", default=250, min=1, max=100000, advanced=True),
    ]


def weight_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """The weight of a term of the student's loss."""
    return io.Float.Input(name, default=default, min=0.0, max=1000.0, step=0.1, optional=True, tooltip=tooltip)


def loss_input(default: str, of: str) -> Any:
    """The adversarial loss. of: whose choice the default is."""
    return setting_input(
        io.Combo,
        MethodConfig,
        "gan_loss",
        f"{of} uses {default}. nonsaturating also works with a batch of 1.",
        "loss",
        options=list(GAN_LOSSES),
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
            options=[NO_PRESET, *presets()],
            default=NO_PRESET,
            optional=True,
            advanced=True,
            tooltip="Train at the noise levels of a known turbo model, so that the student is sampled like it. none: "
            "evenly spaced levels.",
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
