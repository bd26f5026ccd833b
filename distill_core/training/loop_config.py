"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.epochs import BatchSize, ByTokens
from ..models.denoiser import Limits
from ..models.offload import NONE, TIERS
from ..settings import SEED_MAX, Checked, setting
from .optimizers import ADAMW, OPTIMIZERS, SCHEDULES, rate_factor, rate_questions

MOST_STEPS = 10**7
PRECISIONS = ("auto", "float32", "bfloat16")
# accelerate's names, which are also those of the packages.
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "swanlab", "aim", "clearml", "dvclive")


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Settings of the training loop, the same for every method."""

    steps: int = setting(
        1000,
        "Optimiser steps of the whole run. A finished run may be made longer.",
        decides=False,
        low=1,
        high=MOST_STEPS,
    )
    batch_size: int = setting(
        4,
        "Items of one micro-batch, summed over all processes; at least 2 per process with the hinge loss.",
        low=1,
        high=4096,
    )
    tokens_per_batch: int = setting(
        0,
        "Tokens of one micro-batch, in the place of batch_size: each size of latents gets as many items as fit, at "
        "least one a process, so that large and small pictures take about the same memory and time a step. 4096 are "
        "four items at 512 x 512 pixels (SD3, FLUX), or one at 1024 x 1024. 0: batch_size items of every size.",
        added=True,
        low=0,
        high=10**9,
    )
    accumulation: int = setting(
        1, "Micro-batches whose gradients are averaged for one optimiser step.", low=1, high=1024
    )
    student_lr: float = setting(
        1e-4,
        "Learning rate of the student. 1e-5 is usual for a LoRA on a large model (Flash Diffusion), 2e-6 when all "
        "weights are trained (SANA-Sprint); the tiny mini model takes 2e-4 to 6e-4.",
        low=0,
        high=100,
    )
    discriminator_lr: float = setting(
        1e-3,
        "Learning rate of the discriminator, usually about ten times the student's: its heads start from nothing.",
        low=0,
        high=100,
    )
    discriminator_updates: int = setting(
        1,
        "Discriminator updates for each update of the student; those after the first see freshly drawn noise.",
        low=1,
        high=100,
    )
    optimizer: str = setting(
        ADAMW,
        'Optimizer of the student: "adamw", "adamw8bit" (its moments in 8 bits), "adafactor" (almost no moments), '
        '"prodigy" (finds its own rate; student_lr is a factor on it, usually 1) or "schedulefree" (the average takes '
        "the place of a schedule: the rate stays constant). All but the first and the third need a package, see the "
        'extra "optimizers".',
        choices=OPTIMIZERS,
        added=True,
    )
    discriminator_optimizer: str = setting(
        ADAMW,
        "Optimizer of the discriminator, one of the same (prodigy: a discriminator with one rate only).",
        choices=OPTIMIZERS,
        added=True,
    )
    betas: tuple[float, float] = setting(
        (0.0, 0.99),
        "Decay rates of the two moments of an Adam. The first is 0 in StyleGAN-T, whose training ADD follows "
        "(schedulefree takes 0.9 then). Adafactor has none.",
        low=0,
        below=1,
    )
    weight_decay: float = setting(0.0, "Weight decay, for the student and the discriminator.", low=0, high=10)
    gradient_clip: float = setting(
        10.0, "Largest norm of a gradient; a longer one is scaled down to it. 0 leaves all as they are.", low=0
    )
    warmup_steps: int = setting(
        10, "Steps over which both learning rates rise linearly to their full value.", low=0, high=MOST_STEPS
    )
    lr_schedule: str = setting(
        "linear",
        'How both learning rates fall to 0 from decay_from on: "linear", "cosine" (decay_from = 0: over the whole run) '
        'or "constant": not at all.',
        choices=SCHEDULES,
        added=True,
    )
    decay_from: float = setting(
        0.7, "Part of the run (0 to 1) after which both learning rates fall to 0; 1 keeps them constant.", low=0, high=1
    )
    ema_decay: float = setting(
        0.99,
        "Decay of the moving average (EMA) of the student's weights, from 0 to below 1. The average is what is saved.",
        low=0,
        below=1,
    )
    ema_ramp: float = setting(
        10.0,
        "How slowly the average comes to ema_decay: at step n its decay is at most (1 + n) / (ema_ramp + n), so that "
        "it forgets the first steps, far from where the student goes. With 10 a decay of 0.99 is reached at step 890, "
        "with 2 at step 98; 1 takes it from the start.",
        added=True,
        low=1,
        high=1e6,
    )
    precision: str = setting(
        "auto",
        'Arithmetic of the networks: "float32", "bfloat16", or "auto" for bfloat16 on a device that supports it and '
        "float32 on a CPU.",
        choices=PRECISIONS,
    )
    offload: str = setting(
        NONE,
        'Where the frozen weights of the model\'s blocks are while they do not run: "none" (on the device), "ram" '
        '(host memory) or "file" (a mapped file in the run\'s folder, which the system reads again where memory is '
        "short). A block comes to the device when it runs, the next one meanwhile. The student is the same; a step "
        "takes longer. It needs gradient checkpointing.",
        choices=TIERS,
        decides=False,
        added=True,
    )
    offload_activations: bool = setting(
        False,
        "Keep what gradient checkpointing holds of each block, its inputs, in host memory until the backward pass. "
        "Does nothing on a CPU.",
        decides=False,
        added=True,
    )
    ema_in_ram: bool = setting(
        False,
        "Keep the moving average of the student in host memory: 4 bytes less on the device for each trained weight.",
        decides=False,
        added=True,
    )
    channels_last: bool = setting(
        False,
        "Lay the weights of convolutions out channels last, as fast kernels for a UNet read them. It changes the "
        "rounding. Transformers have almost none.",
        added=True,
    )
    compile: bool = setting(
        False,
        "Compile the model's blocks (torch.compile) when they first run, which takes minutes; the steps after it start "
        "fewer kernels. It changes the rounding, and needs a C++ compiler and a model that is neither quantized nor "
        "offloaded.",
        added=True,
    )
    shard: bool = setting(
        False,
        "Share the weights of model and student out among the processes, one on each card, while all weights are "
        "trained (FSDP2, docs/scaling.md): each card keeps a part, and has a block whole while it runs. Needs several "
        "processes. A run goes on with as many as it began with.",
        added=True,
    )
    checkpoint_every: int = setting(
        250, "Steps between checkpoints. Stopping a run writes one too.", decides=False, low=1, high=MOST_STEPS
    )
    snapshot_every: int = setting(
        0,
        "Steps between students that are kept to compare, in the folder snapshots beside the run's own file. 0: none.",
        decides=False,
        added=True,
        low=0,
        high=MOST_STEPS,
    )
    log_every: int = setting(
        50,
        "Steps between lines in the console: losses, seconds a step, time left, status. 0: none.",
        decides=False,
        added=True,
        low=0,
        high=MOST_STEPS,
    )
    trackers: tuple[str, ...] = setting(
        (),
        'Where the figures of each step go beside the log: "tensorboard" (files in the folder trackers of the run) or '
        "another tracker of accelerate, whose account and package are yours to set up. Each needs its package, and "
        "accelerate.",
        decides=False,
        added=True,
        choices=TRACKERS,
    )
    sample_every: int = setting(
        250,
        "Steps between pictures of the student, kept in the folder samples of the run and shown on its page, run.html. "
        "0: none.",
        decides=False,
        added=True,
        low=0,
        high=MOST_STEPS,
    )
    caption_dropout: float = setting(
        0.0,
        "Part (0 to below 1) of the items that are trained with the empty conditioning, drawn for each item (for a "
        "whole batch where its texts have another length). It leaves the student usable without a prompt.",
        added=True,
        low=0,
        below=1,
    )
    validation: float = setting(
        0.0,
        "Items that are held out: never trained on, and what the student is measured on while it trains. Below 1 a "
        "share of all, from 1 on their number; 0: none. The figure is the mean squared distance between their latents "
        "and the averaged student's answer at each of its levels (from the stored pairs, where there are some), with "
        "noise that never changes. It rises when the student learns the training items by heart.",
        added=True,
        low=0,
        high=100000,
    )
    validation_every: int = setting(
        100,
        "Steps between two measurements on the items held out; also after the first and the last step.",
        decides=False,
        added=True,
        low=1,
        high=MOST_STEPS,
    )
    retention_every: int = setting(
        50,
        "Steps between measurements of retention (docs/retention.md): what the student keeps of the turbo model that "
        "it tunes, 1 for all; also after the last step. Measured with the method tune, and with any other where "
        "keep_at_least is above 0. 0: never.",
        decides=False,
        added=True,
        low=0,
        high=MOST_STEPS,
    )
    keep_at_least: float = setting(
        0.0,
        "End the run when retention falls below this, from 0 to 1, and keep the last student that was measured above "
        "it. For models that are tuned and turbo before: a student that is still to become one has nothing to keep. "
        "0: never.",
        decides=False,
        added=True,
        low=0,
        high=1,
    )
    seed: int = setting(0, "Seed of everything random: new weights, batches and noise.", low=0, high=SEED_MAX)
    preflight: bool = setting(
        True, "Look for mistakes that ruin a run before its first step (docs/health.md).", decides=False
    )
    stop_when_lost: bool = setting(
        True,
        "End a run whose student has been lost for 100 steps: its images are all alike or wild, and the discriminator "
        "could not be more right or more wrong about them. The weights from before are kept. A value that is not "
        "finite always ends a run.",
        decides=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compile", "channels_last"):
            if getattr(self, name) and (self.offload != NONE or self.shard):
                raise ValueError(
                    f"{name} is for weights that stay where they are: set it to false, or shard to false and offload "
                    f"to {NONE!r}"
                )

    def optimizer_of(self, student: bool) -> str:
        """The name of a player's optimizer."""
        return self.optimizer if student else self.discriminator_optimizer

    def batches(self, limits: Limits, processes: int = 1) -> BatchSize:
        """The size of a micro-batch, for a network with ``limits``. Raises ValueError for one that cannot be shared out
        among the processes."""
        if self.tokens_per_batch:
            return ByTokens(self.tokens_per_batch, limits, processes)
        if self.batch_size % processes:
            raise ValueError(f"batch_size {self.batch_size} does not divide among {processes} processes")
        return self.batch_size

    def lr_scale(self, step: int, optimizer: str = ADAMW) -> float:
        """The factor on the learning rates at a step, for players of that optimizer."""
        schedule = "constant" if optimizer == "schedulefree" else self.lr_schedule
        return rate_factor(schedule, step, self.steps, self.warmup_steps, self.decay_from)

    def mixed(self, device: torch.device) -> bool:
        """Whether the networks compute in bfloat16 under autocast on a device."""
        if self.precision == "auto":
            # Older cards (Turing, Volta) only emulate bfloat16, which is slower than float32.
            return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.precision == "bfloat16"

    def questions(self) -> list[str]:
        """What is allowed and yet odd, a sentence each."""
        return rate_questions(
            {
                "student_lr": (self.optimizer, self.student_lr),
                "discriminator_lr": (self.discriminator_optimizer, self.discriminator_lr),
            }
        )
