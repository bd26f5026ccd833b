"""Checks before the first step, each named after a mistake that has cost others a run.

``preflight(run)`` costs a few forwards and one backward and leaves the run as it found it. Where they were seen:
adapters left on in the discriminator (Target-Driven-Distillation, issue 22), the student's loss training the heads
(S3Diff, 25), a discriminator on outputs that are not latents (FastVideo, 106), v taken for x0, pure noise at every
level and noise for real data (Z-Image-LADD's log), latents that were never scaled (ComfyUI, 13089).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..models.denoiser import Denoiser
from .loop import Run, accumulate, autocast

SCALE = (0.5, 2.0)  # standard deviation of latents in model space; Stable Diffusion's unscaled have 5.5, FLUX's 2.8
CLEAN_TIME, NOISED_TIMES = 0.02, (0.5, 0.7)  # flow times of the identity and of the knowledge check


def preflight(run: Run) -> None:
    """Refuse a run that cannot work. Raises ValueError with every fault that was found, each with what to do.

    Nothing is trained: weights, optimisers and gradients are as before. Works for any method whose ``start`` gives a
    step and whose ``student`` and ``teacher`` are Denoisers.
    """
    batch, _ = run.batch(0)
    run.method.check(batch, len(batch.latents))
    with autocast(run):
        faults = list(latent_faults(batch)) or list(teacher_faults(run, batch))
        faults = faults or [*start_faults(run, batch), *view_faults(run, batch)]
    faults = faults or list(gradient_faults(run, batch))
    if faults:
        raise ValueError("stopped before the first step:\n" + "\n".join(f"- {fault}" for fault in faults))


def latent_faults(batch: Batch) -> Iterator[str]:
    """What the real latents alone tell."""
    x = batch.latents.float()
    std = x.std().item()
    if not SCALE[0] <= std <= SCALE[1]:
        yield (
            f"wrong latent scale: the latents have a standard deviation of {std:.2f}, and what networks are trained on "
            "has about 1. Scale them as the VAE's config says (ComfyUI: process_latent_in), exactly once"
        )
    elif looks_like_noise(x):
        yield (
            "real is noise: the real latents have no structure, neighbours are independent. Store the teacher's "
            "results or encoded images, not what they started from"
        )


def looks_like_noise(x: Tensor) -> bool:
    """Whether neighbours in [B, C, H, W] are independent, within what chance allows (4 standard errors)."""
    x = x - x.mean((0, 2, 3), keepdim=True)
    left, right = x[..., :-1], x[..., 1:]
    if left.numel() < 256:  # too little to tell
        return False
    correlation = (left * right).mean() / x.square().mean().clamp(min=1e-12)
    return correlation.abs().item() < 4 / left.numel() ** 0.5


@torch.no_grad()
def error_at(denoiser: Denoiser, batch: Batch, time: float) -> float:
    """How far ``denoiser`` is from the latents at a flow time, as a part of their standard deviation."""
    x, process = batch.latents, denoiser.process
    sigma = process.sigma_at_flow_time(x.new_full((len(x),), time))
    noised = process.noise_scaling(sigma, ItemNoise(0, range(len(x))).normal_like(x), x)
    return ((denoiser(noised, sigma, batch.cond) - x).square().mean() / x.var()).sqrt().item()


def teacher_faults(run: Run, batch: Batch) -> Iterator[str]:
    """Whether the teacher gives clean latents, and knows these ones."""
    teacher = run.method.teacher
    if error_at(teacher, batch, CLEAN_TIME) > 0.3:
        yield (
            "the teacher's output is not the clean latent: almost without noise it should return its input. Its "
            "prediction (noise or velocity) is not turned into x0, or its noise process is not the model's"
        )
        return
    for time in NOISED_TIMES:
        guess = time / ((1 - time) ** 2 + time**2) ** 0.5  # of one who knows nothing but the variance
        error = error_at(teacher, batch, time)
        if not error < 1.15 * guess:
            yield (
                f"the teacher does not know these latents: at flow time {time} it misses them by {error:.2f} of their "
                f"standard deviation, a blind guess by {guess:.2f}. They come from another VAE or are noise, or the "
                "prediction type or timestep scale is not the model's"
            )
            return


def start_faults(run: Run, batch: Batch) -> Iterator[str]:
    """Whether the student starts from noised latents at the levels that are not pure noise."""
    method = run.method
    if getattr(getattr(method, "config", None), "own_share", 0):
        return  # then it starts from samples of its own on purpose
    with torch.no_grad():
        step = method.start(batch, ItemNoise(0, range(len(batch.latents))), run.config.steps)
        time = method.student.process.flow_time(step.sigma)
        share, expected = _likeness(step.x, batch.latents), (1 - time) / ((1 - time) ** 2 + time**2).sqrt()
    low = time < 0.8
    if low.any() and (share < 0.4 * expected)[low].all():
        yield (
            "pure noise at every level: below the highest level the student's input has nothing of its latent in it. "
            "Noise the latents with the process's noise_scaling"
        )


def _likeness(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1))


def view_faults(run: Run, batch: Batch) -> Iterator[str]:
    """Whether the student's weights move the student, and nothing but the student."""
    method = run.method
    with torch.no_grad():
        before = _views(method, batch)
        with _disturbed(run.student_parameters):
            after = _views(method, batch)
    if torch.equal(before["student"], after["student"]):
        yield (
            "the student's weights do not change its output: its LoRA is never on. Give its Denoiser the "
            "LoRA, and turn it on in the forward"
        )
    changed = [name for name in before if name != "student" and not torch.equal(before[name], after[name])]
    if changed:
        yield (
            f"adapters are on in the {' and the '.join(changed)}: what the frozen teacher computes changes with the "
            "student's weights. Use a Denoiser without a LoRA there"
        )


def _views(method, batch: Batch) -> dict[str, Tensor]:
    x = batch.latents[:2]
    cond, sigma = (
        batch.cond[: len(x)],
        method.teacher.process.sigma_at_flow_time(x.new_full((len(x),), NOISED_TIMES[0])),
    )
    views = {"student": method.student(x, sigma, cond), "teacher": method.teacher(x, sigma, cond)}
    if getattr(method, "taps", None):
        maps = method.teacher.features(x, sigma, cond, method.taps)
        views["discriminator"] = torch.cat([m.flatten() for m in maps])
    return views


@contextmanager
def _disturbed(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """The same weights with noise added, so that a LoRA that starts as 0 has an effect."""
    saved = {name: value.detach().clone() for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for value in parameters.values():
            value.data.add_(0.1 * torch.randn(value.shape, generator=generator).to(value))
        yield
    finally:
        for name, value in parameters.items():
            value.data.copy_(saved[name])


def gradient_faults(run: Run, batch: Batch) -> Iterator[str]:
    """Whether each loss reaches its own player and trains nobody else."""
    with autocast(run):
        step = run.method.start(batch, ItemNoise(0, range(len(batch.latents))), run.config.steps)
    views = (run.method.student, run.method.teacher)
    networks = [view.backend.network for view in views if hasattr(getattr(view, "backend", None), "network")]
    players = {player.name: list(player.parameters.values()) for player in run.players}
    mine = {id(p) for parameters in players.values() for p in parameters}
    strangers = [p for network in networks for p in network.parameters() if id(p) not in mine]
    if any(p.requires_grad for p in strangers):
        yield "the backbone is not frozen: weights that no one trains ask for gradients. Call requires_grad_(False)"
    try:
        for player in run.players:
            accumulate(run, player, step, defaultdict(list))
            if not any(p.grad is not None and p.grad.any() for p in players[player.name]):
                yield f"no gradient reaches the {player.name}: its loss does not depend on its weights"
            others = [name for name in players if name != player.name and _any_gradient(players[name])]
            if others or _any_gradient(strangers):
                yield f"the {player.name}'s loss trains the {' and the '.join(others) or 'backbone'}, too"
            _clear(players[player.name])
    finally:
        for parameters in (*players.values(), strangers):
            _clear(parameters)


def _any_gradient(parameters: Sequence[Tensor]) -> bool:
    return any(p.grad is not None for p in parameters)


def _clear(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
