"""What one training step costs, in forwards of the backbone: ``python tests/benchmarks/step_flops.py``.

A 12-block SD3 transformer (width 256, 64 image tokens, batch 2), the discriminator on blocks 2, 5 and 8, counted by
torch's flop counter. Beside ours (one copy, LoRA of rank 8, early exit, the fake's features used twice) stands the
naive step: two copies, full fine-tuning, the student run again for the discriminator, features from full forwards.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.data.dataset import Batch  # noqa: E402
from distill_core.diffusion.noise import ItemNoise  # noqa: E402
from distill_core.discriminators.latent import LatentDiscriminator  # noqa: E402
from distill_core.methods.ladd import LADD, LADDConfig  # noqa: E402
from distill_core.models.backends.diffusers import DiffusersBackend  # noqa: E402
from distill_core.models.denoiser import Cond, Denoiser  # noqa: E402
from distill_core.training.loop import Run, TrainConfig, training_step  # noqa: E402

TAPS = [f"transformer_blocks.{i}" for i in (2, 5, 8)]
BATCH, LATENT, TEXT_TOKENS, WIDTH, RANK = 2, (16, 16, 16), 16, 256, 8


class OneBatch:
    """A dataset of one batch."""

    def __init__(self) -> None:
        cond = Cond(torch.randn(BATCH, TEXT_TOKENS, WIDTH), torch.randn(BATCH, 64))
        self.content = Batch(torch.randn(BATCH, *LATENT), cond)

    def batch(self, *args) -> Batch:
        return self.content


def build_network() -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=12,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )


def flops(function) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in a call, backward included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def build_run(dataset: OneBatch, network: torch.nn.Module, **config) -> Run:
    backend = DiffusersBackend(network)
    teacher, student = Denoiser(backend), Denoiser(backend, backend.new_lora(RANK))
    heads = LatentDiscriminator.for_teacher(teacher, TAPS, dataset.content)
    method = LADD(student, teacher, heads, taps=TAPS, config=LADDConfig(**config))
    return Run(method, dataset, TrainConfig(batch_size=BATCH))


def naive_step(dataset: OneBatch, student: torch.nn.Module, run: Run) -> None:
    """Generator and discriminator update as a first implementation would write them."""
    batch, noise = dataset.content, ItemNoise(0, range(BATCH))
    teacher, process = run.method.teacher, run.method.teacher.process
    student_view = Denoiser(DiffusersBackend(student, process))
    student.requires_grad_(True)
    modules = dict(teacher.backend.network.named_modules())
    sigma, x = torch.ones(BATCH), noise.normal_like(batch.latents)
    time = torch.full((BATCH,), 0.5)

    def logits(latents):
        maps, side = [], LATENT[1] // 2
        keep = [modules[tap].register_forward_hook(lambda m, a, out: maps.append(out[-1])) for tap in TAPS]
        teacher(process.noise_scaling(time, x, latents), time, batch.cond)
        for handle in keep:
            handle.remove()
        maps = [tokens.transpose(1, 2).unflatten(2, (side, side)) for tokens in maps]
        return run.method.discriminator(maps, time, batch.cond.pooled)

    loss = -logits(student_view(x, sigma, batch.cond)).mean()
    torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    with torch.no_grad():
        fake = student_view(x, sigma, batch.cond)
    run.method.gan_discriminator(logits(fake), logits(batch.latents)).backward()


def count() -> dict[str, float]:
    """Forwards a step, and the weights held and trained as parts of the backbone's."""
    torch.manual_seed(0)
    dataset, network = OneBatch(), build_network()
    size = sum(p.numel() for p in network.parameters())
    run = build_run(dataset, network)
    cond, latents = dataset.content.cond, dataset.content.latents
    forward = flops(lambda: run.method.teacher(latents, torch.ones(BATCH), cond))
    ours = flops(lambda: training_step(run))
    naive = flops(lambda: naive_step(dataset, copy.deepcopy(network), run))
    path = sum(p.numel() for p in run.student_parameters.values())
    return {"ours": ours / forward, "naive": naive / forward, "held": 1 + path / size, "trained": path / size}


def main() -> None:
    result = count()
    print(f"{'':24}{'forwards a step':>16}{'weights held':>14}{'trained':>9}")
    print(f"{'naive, two copies':24}{result['naive']:16.2f}{2:14.2f}{1:9.2f}")
    print(f"{'one copy, two views':24}{result['ours']:16.2f}{result['held']:14.2f}{result['trained']:9.2f}")


if __name__ == "__main__":
    main()
