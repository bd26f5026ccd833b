"""All methods on the mini model at one budget: ``python -m distill_core compare --out DIR``.

Every entry of `ENTRIES` is trained and evaluated for every seed, one after the other, on one thread; each run's result
is written when it is done, so the command can be stopped and started again, and the table so far is always there.
Budgets are equal in processor time: an entry's steps are those that took about `BUDGET` seconds on the machine the
table in docs/methods.md was made on. Teacher latents and their paths are cached before and not counted, for any method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import mini
from .build import Parts, VisionConfig, new_method
from .checkpoint import load_tensors, save_json, save_tensors
from .data import CacheConfig, LatentDataset
from .demo import (
    EVALUATION_SEED,
    LEVELS,
    cache_dataset,
    draw_samples,
    git_commit,
    machine,
    mini_backend,
    mini_conditioning,
)
from .denoiser import Denoiser, Guided
from .methods.add import ADDConfig
from .methods.diffusion2gan import Diffusion2GANConfig
from .methods.ladd import LADDConfig
from .methods.student import StudentConfig
from .metrics import MiniEvaluator
from .train import Run, TrainConfig, train

BUDGET = 65
IMAGES = 1000
RANK = 32
VISION_SIZE = 32  # of the autoencoder's encoder under ADD's heads; the 64 px of the images would cost four times as much
TEACHER_STEPS = (1, 2, 4, 8, 25)
CACHE = CacheConfig(
    count=3072, steps=16, guidance=mini.GUIDANCE, sizes=(mini.LATENT_SHAPE[1:],), state_sigmas=LEVELS, shard_size=512,
    batch_size=128,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One configuration: the method's settings, the loop's, and how the student is sampled.

    steps: the step counts it is evaluated at.  eta: of the ancestral sampler.  pretrained: whether the student starts
    as the teacher; else as a network of random weights, all of them trained.
    """

    method: StudentConfig
    train: TrainConfig
    steps: tuple[int, ...] = (1, 2, 4)
    eta: float = 1.0
    pretrained: bool = True


def settings(steps: int, batch_size: int = 32, student_lr: float = 6e-4, discriminator_lr: float = 4e-3) -> TrainConfig:
    return TrainConfig(steps, batch_size, student_lr=student_lr, discriminator_lr=discriminator_lr)


ADD_SETTINGS = ADDConfig()
LADD_SETTINGS = LADDConfig(
    probabilities=(0.4, 0.2, 0.2, 0.2), warmup_probabilities=(0.5, 0.5, 0.0, 0.0), warmup_steps=30, renoise_mean=0.0
)
ENTRIES: dict[str, Entry] = {
    "add": Entry(ADD_SETTINGS, settings(100, 16)),
    "ladd": Entry(LADD_SETTINGS, settings(135, 48, 2e-4), eta=0.5),
    "diffusion2gan": Entry(Diffusion2GANConfig(), settings(150), steps=(1,)),
}


def initial_student(entry: Entry, method) -> None:
    """Random weights for the student where the entry asks for them."""
    if entry.pretrained:
        return
    for module in method.student.backend.network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def prepare(entry: Entry, dataset: LatentDataset, seed: int, folder: Path | None = None) -> Run:
    """The entry's run on the mini model; every weight comes from the seed."""
    config = replace(entry.train, seed=seed)
    backend, autoencoder = mini_backend(), mini.load_autoencoder()

    def decode(latents: Tensor) -> Tensor:
        return autoencoder.decoder(latents.contiguous(memory_format=torch.channels_last))

    parts = Parts(backend, decode, autoencoder.encoder)
    torch.manual_seed(seed)
    rank = RANK if entry.pretrained else 0
    example, uncond = dataset.batch(0, 16, seed), dataset.uncond()
    method = new_method(
        entry.method, parts, example, rank, uncond, mini.GUIDANCE, taps=taps_of(entry, backend),
        vision=VisionConfig(size=VISION_SIZE),
    )  # fmt: skip
    initial_student(entry, method)
    return Run(method, dataset, config, folder, {"entry": asdict(entry)})


def taps_of(entry: Entry, backend) -> Sequence[str] | None:
    return backend.tap_names if isinstance(entry.method, LADDConfig) else None


class ForwardCount:
    """How many items have passed each network; hooks on whole networks, so that early exits count as one."""

    def __init__(self, **networks: nn.Module) -> None:
        self.items: dict[str, int] = dict.fromkeys(networks, 0)
        for name, network in networks.items():
            network.register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def _hook(self, name: str):
        def count(module, args, kwargs):
            self.items[name] += len(args[0] if args else kwargs["hidden_states"])

        return count


def counted_networks(method) -> dict[str, nn.Module]:
    """Backbone and, where they exist, the student's or discriminator's own copies of it and the vision network."""
    networks = {"backbone": method.teacher.backend.network}
    if method.student.backend is not method.teacher.backend:
        networks["student copy"] = method.student.backend.network
    critic = getattr(method.discriminator, "critic", None)
    if critic is not None and critic.backend is not method.teacher.backend:
        networks["discriminator copy"] = critic.backend.network
    vision = getattr(method, "vision", None)
    if vision is not None:
        networks["vision"] = vision.network
    return networks
