"""A backbone of a few thousand weights, for tests of what does not depend on the architecture; fast to import and run.

``python tests/toy.py OUT DATA STEPS [key=value ...]`` trains it, for tests that kill the process.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.process import FlowProcess
from distill_core.methods.add import ADDConfig
from distill_core.methods.base import StudentMethod
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.config import MethodConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import new_method
from distill_core.models.denoiser import Cond, Denoiser, Guided, Limits
from distill_core.models.features import collect_taps, hidden_states_of, tokens_to_map
from distill_core.models.lora import Lora, LoraSwitch
from distill_core.training.loop import Run, TrainConfig, train

CHANNELS, CONTEXT, POOLED, WIDTH = 4, 8, 6, 16
TAPS = ["blocks.0", "blocks.1"]
LEVELS = (1.0, 0.75, 0.5, 0.25)
TERMS = {
    "hinge": LADDConfig(warmup_steps=2),
    "mixed": LADDConfig({"adversarial": 1.0, "pairs": 1.0, "consistency": 0.5}, gan_loss="relativistic", r1=0.1),
    "add": ADDConfig(r1=0.1),
    "diffusion2gan": Diffusion2GANConfig(r1=0.1, r1_every=2),
    "diffusion2gan-lora": Diffusion2GANConfig(critic="lora", critic_rank=2),
    "dmd2": DMD2Config({"distribution_matching": 1.0, "adversarial": 0.1}, fake_score_updates=1),
}
# What only these promise: the others' discriminators have state (spectral norms) or see neighbours in a batch (mixing),
# and a fresh low-rank path has gradients of 0 (their own tests look at it).
LADD_TERMS = ("hinge", "mixed")


class Block(nn.Module):
    """Tokens see their own row through a linear layer and all others through the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        both = torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], dim=-1)
        return x + self.outlet(torch.tanh(self.inlet(both)))


class ToyNetwork(nn.Module):
    """[B, 4, H, W], timestep [B], context [B, T, 8], pooled [B, 6] -> velocity, with three blocks over pixels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inlet, self.outlet = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
            self.cond = nn.Linear(CONTEXT + POOLED + 1, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, timestep, cond: Cond):
        tokens = self.inlet(x.flatten(2).transpose(1, 2))
        text = torch.cat([cond.context.mean(1), cond.pooled, timestep.view(-1, 1) / 1000], dim=1)
        tokens = tokens + self.cond(text).unsqueeze(1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens_to_map(self.outlet(tokens), *x.shape[2:])


class ToyBackend:
    """The interface of `denoiser.Backend`."""

    def __init__(self, seed: int = 0) -> None:
        self.network = ToyNetwork(seed).eval().requires_grad_(False)
        self.process, self.switch = FlowProcess(), LoraSwitch()

    def forward(self, x, timestep, cond):
        return self.network(x, timestep, cond)

    def maps(self, x, timestep, cond, taps, whole=False):
        outputs = collect_taps(self.network, taps, lambda: self.forward(x, timestep, cond), self.switch, whole=whole)
        return [out if out.ndim == 4 else tokens_to_map(out, *x.shape[2:]) for out in outputs]

    def block_input(self, args, kwargs):
        return hidden_states_of(args, kwargs)

    def trainable_copy(self) -> ToyBackend:
        backend = ToyBackend()
        backend.network.load_state_dict(self.network.state_dict())
        backend.network.requires_grad_(True)
        return backend

    def multi_scale_taps(self) -> tuple[list[str], list[str]]:
        return [f"blocks.{i}" for i in range(3)], ["blocks.1", "blocks.2"]

    def limits(self) -> Limits:
        return Limits(CHANNELS, CONTEXT, POOLED)

    def new_lora(self, rank: int, targets=None) -> Lora:
        targets = [f"blocks.{i}.{name}" for i in range(3) for name in ("inlet", "outlet")]
        return Lora(self.network, targets, rank, self.switch)


def toy_conds(rows: int = 3) -> tuple[Cond, Cond]:
    """Conditionings and the empty one."""
    g = torch.Generator().manual_seed(5)
    cond = Cond(torch.randn(rows + 1, 2, CONTEXT, generator=g), torch.randn(rows + 1, POOLED, generator=g))
    return cond[:rows], cond[rows:]


def cache_toy(folder, description: dict | None = None, conds: Cond | None = None, **changes) -> LatentDataset:
    """A dataset of the toy teacher: 16 items of 4x6 in shards of 8 with the states at `LEVELS`."""
    settings = dict(count=16, steps=8, guidance=2.0, sizes=((4, 6),), state_sigmas=LEVELS, shard_size=8, batch_size=8)
    cond, empty = toy_conds()
    teacher, config = Guided(Denoiser(ToyBackend()), empty, 2.0), CacheConfig(**{**settings, **changes})
    for _ in cache_latents(teacher, conds or cond, CHANNELS, config, folder, description):
        pass
    return LatentDataset(folder)


class ToyEncoder(nn.Module):
    """A vision network of three convolutions, shaped like the encoder of a tiny autoencoder."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        strides = (2, 1, 2, 1)
        convs = [nn.Conv2d(3 if i == 0 else width, width, 3, stride, 1) for i, stride in enumerate(strides)]
        self.layers = nn.Sequential(*convs)

    def forward(self, images):
        return self.layers(images)


def toy_parts(seed: int = 0) -> Components:
    """A toy backbone with a linear decoder [B, 4, H, W] -> [B, 3, 2 H, 2 W] and an encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder, encoder = nn.ConvTranspose2d(CHANNELS, 3, 2, 2).requires_grad_(False), ToyEncoder()
    return Components(ToyBackend(), lambda latents: torch.tanh(decoder(latents)), encoder)


def toy_method(
    dataset: LatentDataset, config: MethodConfig = LADDConfig(), seed: int = 0, rank: int = 2, parts: Components = None
) -> StudentMethod:
    """Any method on a fresh toy backbone; all weights come from the seed. A rank of 0 trains a copy."""
    parts, heads = parts or toy_parts(), DiscriminatorConfig(width=8, blocks=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        taps = TAPS if isinstance(config, LADDConfig | DMD2Config) else ()
        example = dataset.batch(0, 2, 0)
        method = new_method(
            config, parts, example, rank, uncond=dataset.uncond(), guidance=2.0, taps=taps, discriminator=heads
        )
        for up in method.student.lora.up if rank else ():
            nn.init.normal_(up, std=0.05)
    return method


def toy_run(
    dataset,
    folder=None,
    ladd: MethodConfig = LADDConfig(),
    description=None,
    accelerator=None,
    rank: int = 2,
    **changes,
) -> Run:
    settings = dict(steps=6, batch_size=4, student_lr=1e-2, discriminator_lr=1e-2, warmup_steps=3, checkpoint_every=100)
    config = TrainConfig(**{**settings, **changes})
    description = {"ladd": asdict(ladd), **(description or {})}
    return Run(toy_method(dataset, ladd, config.seed, rank), dataset, config, folder, description, accelerator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, data, steps, *rest = sys.argv[1:]
    changes = {key: json.loads(value) for key, value in (item.split("=") for item in rest)}
    ladd = TERMS[changes.pop("terms", "hinge")]
    for event in train(toy_run(LatentDataset(data), out, ladd, steps=int(steps), **changes)):
        print(event.step, flush=True)
        time.sleep(0.02)  # who waits for a step to kill the process is not left far behind
