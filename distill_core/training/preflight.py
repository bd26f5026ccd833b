"""Checks before the first step, each named after a mistake that has cost others a run.

``preflight(run)`` costs a few forwards and one backward and leaves the run as it found it. Where they were seen:
adapters left on in the discriminator (Target-Driven-Distillation, issue 22), the student's loss training the heads
(S3Diff, 25), a discriminator on outputs that are not latents (FastVideo, 106), v taken for x0, pure noise at every
level and noise for real data (Z-Image-LADD's log), latents that were never scaled (ComfyUI, 13089).

Latents are judged by whether the teacher can denoise them, on a sample of the whole dataset. Flat, white or unusual
pictures are fine when it can. When it cannot, their scale and structure tell why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import same_level
from ..models.denoiser import Denoiser
from .figures import Figures
from .loop import Run, accumulate, autocast, read_figures

SCALE = (0.5, 2.0)  # standard deviation of latents in model space; Stable Diffusion's unscaled have 5.5, FLUX's 2.8
TOP_TIME = 0.9  # flow time that the student's highest level has at least: sampling begins in pure noise
FLAT, PLAIN = 0.1, 0.6  # that of pictures of one tone; what of it lies inside pictures, not in their mean colour
CLEAN_TIME, NOISED_TIMES = 0.02, (0.5, 0.7)  # flow times of the identity and of the knowledge check
SAMPLE_BATCHES, SAMPLE_ROWS = 4, 4  # of the dataset: batches that are looked at, and rows of each


SKIP = "(preflight in [train], or in the node Training Settings, switches these checks off)"


def preflight(run: Run) -> None:
    """Refuse a run that cannot work. Raises ValueError with every fault that was found, each with what to do.

    Nothing is trained: weights, optimisers and gradients are as before. Works for any method whose ``start`` gives a
    step and whose ``student`` and ``teacher`` are Denoisers. Several processes all raise what one of them has found.
    """
    faults = everyones(run, faults_of(run))
    if faults:
        listed = f" {faults[0]} " if len(faults) == 1 else "\n" + "".join(f"- {fault}\n" for fault in faults)
        raise ValueError(f"stopped before the first step:{listed}{SKIP}")


def faults_of(run: Run) -> list[str]:
    """What this process finds; a failed check ends the search for what would follow from it."""
    batch, _ = run.batch(0)
    try:
        run.method.check(batch, run.smallest_share)
    except ValueError as error:
        return [str(error)]
    with autocast(run):
        sample = sample_of(run)
        faults = [fault for name, view in taught(run) for fault in teacher_faults(view, sample, name)]
        faults = faults or [*start_faults(run, batch), *view_faults(run, batch)]
    return faults or list(gradient_faults(run, batch))


def taught(run: Run) -> list[tuple[str, Denoiser]]:
    """Whose knowledge of the latents counts: the teacher's, and that of the model where it is not the teacher."""
    teacher, base = run.method.teacher, getattr(run.method.student, "base", None)
    if base is None or (base is teacher.backend and teacher.lora is None):
        return [("teacher", teacher)]
    return [("model", Denoiser(base)), ("teacher", teacher)]


def everyones(run: Run, faults: list[str]) -> list[str]:
    """The faults that any process has found, each once."""
    if run.alone:
        return faults
    from accelerate.utils import gather_object

    return list(dict.fromkeys(gather_object(faults)))


def sample_of(run: Run) -> list[Batch]:
    """Some rows of several batches: other items, and where there are several sizes, most likely other sizes."""
    config, sample = run.config, []
    for number in range(SAMPLE_BATCHES):
        batch = run.dataset.batch(number, run.batch_size, config.seed).to(run.device)
        rows = batch.distinct[:SAMPLE_ROWS]
        sample.append(Batch(batch.latents[rows], batch.cond[rows]))
    return sample


def looks_like_noise(latents: Sequence[Tensor]) -> bool:
    """Whether neighbours in latents [B, C, H, W] are independent, within what chance allows (4 standard errors)."""
    products, squares, count = 0.0, 0.0, 0
    for x in latents:
        x = x.float() - x.float().mean((0, 2, 3), keepdim=True)
        product = x[..., :-1] * x[..., 1:]
        products, squares, count = products + product.sum().item(), squares + x.square().sum().item(), count + x.numel()
    return abs(products) < 4 * squares / max(1, count) ** 0.5


@torch.no_grad()
def squared_error_at(denoiser: Denoiser, batch: Batch, time: float) -> float:
    """The sum of squared differences between the latents and what ``denoiser`` makes of them at a flow time."""
    x, process = batch.latents, denoiser.process
    sigma = process.sigma_at_flow_time(x.new_full((len(x),), time))
    noised = process.noise_scaling(sigma, ItemNoise(0, range(len(x))).normal_like(x), x)
    return (denoiser(noised, sigma, batch.cond).float() - x).square().sum().item()


def error_at(denoiser: Denoiser, sample: Sequence[Batch], time: float) -> float:
    """The root mean square error of ``denoiser`` on a sample at a flow time."""
    count = sum(batch.latents.numel() for batch in sample)
    return (sum(squared_error_at(denoiser, batch, time) for batch in sample) / count) ** 0.5


def spreads(sample: Sequence[Batch]) -> tuple[float, float]:
    """Standard deviation of the latents: of all values, and inside pictures, without the mean of each channel."""
    latents = [batch.latents.float() for batch in sample]
    inside = torch.cat([(x - x.mean((2, 3), keepdim=True)).flatten() for x in latents])
    return torch.cat([x.flatten() for x in latents]).std().item(), inside.square().mean().sqrt().item()


def teacher_faults(teacher: Denoiser, sample: Sequence[Batch], name: str = "teacher") -> Iterator[str]:
    """Whether the teacher, or the model called ``name``, gives clean latents, and knows those of the sample."""
    std, inside = spreads(sample)
    if inside > SCALE[1]:
        yield wrong_scale(inside)
        return
    if error_at(teacher, sample, CLEAN_TIME) > 0.3 * max(1.0, std):
        yield (
            f"the {name}'s output is not the clean latent: almost without noise it should return its input. Its "
            "prediction (noise or velocity) is not turned into x0, or its noise process is not the model's"
        )
        return
    for time in NOISED_TIMES:
        guess = time * std / ((1 - time) ** 2 * std**2 + time**2) ** 0.5  # of one who knows nothing but the variance
        error = error_at(teacher, sample, time)
        noise = looks_like_noise([batch.latents for batch in sample])
        if not error < (0.9 if noise else 1.15) * guess:
            yield why_unknown(
                sample, noise, f"at flow time {time} it misses them by {error:.2f}, a guess by {guess:.2f}", name
            )
            return
    if not SCALE[0] <= std <= SCALE[1]:
        logging.warning(
            "the latents have an unusual standard deviation of %.2f (about 1 is usual); the %s knows "
            "them, so the pictures may be dark, white or flat",
            std,
            name,
        )


def why_unknown(sample: Sequence[Batch], noise: bool, figures: str, name: str = "teacher") -> str:
    """The likeliest reason why the teacher, or the model called ``name``, cannot denoise these latents."""
    std, inside = spreads(sample)
    if std < FLAT or inside < PLAIN * std:
        return (
            f"the pictures are almost of one tone (white, black or empty), and the {name} does not know them "
            f"({figures}): files of 16 bits are clipped to white by some loaders. Look at the pictures; if they are "
            "meant to be so, skip these checks"
        )
    if not SCALE[0] <= std <= SCALE[1]:
        return wrong_scale(std)
    if noise:
        return (
            f"real is noise: neighbours in the real latents are independent, and the {name} does not know them "
            f"({figures}). Store the teacher's results or encoded images, not what they started from"
        )
    return (
        f"the {name} does not know these latents ({figures}). They come from another VAE or are noise, or the "
        "prediction type or timestep scale is not the model's"
    )


def wrong_scale(std: float) -> str:
    return (
        f"wrong latent scale: the latents have a standard deviation of {std:.2f}, and what networks are trained on has "
        "about 1. Scale them as the VAE's config says (ComfyUI: process_latent_in), exactly once"
    )


def start_faults(run: Run, batch: Batch) -> Iterator[str]:
    """Whether the student starts at pure noise, and from noised latents at the levels that are not pure noise."""
    method, process = run.method, run.method.student.process
    top = max(method.levels)
    highest = process.flow_time(torch.tensor(top)).item()
    if highest < TOP_TIME and not same_level(top, process.sigma_max):
        yield (
            f"the highest level is no pure noise: student_sigmas begin at {top:.4g}, flow time {highest:.2f}, and "
            f"sampling begins at this model's {process.sigma_max:.4g}. Give levels in the model's own sigmas, or "
            "leave student_sigmas empty"
        )
    if getattr(getattr(method, "config", None), "own_share", 0):
        return  # then it starts from samples of its own on purpose
    with torch.no_grad():
        step = method.start(batch, ItemNoise(0, range(len(batch.latents))), run.config.steps)
        time = method.student.process.flow_time(step.sigma)
        share, expected = _likeness(step.x, step.batch.latents), (1 - time) / ((1 - time) ** 2 + time**2).sqrt()
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
    """Whether each loss reaches its own player and trains nobody else.

    The student is disturbed for it, and who else begins as the teacher: one that still is the teacher has no gradient
    where that is what it is to be, or what it is compared with.
    """
    with ExitStack() as stack:
        for player in run.players:
            if player is run.players[0] or player.begins_as_teacher:
                stack.enter_context(_disturbed(player.parameters))
        yield from list(_gradient_faults(run, batch))


def _gradient_faults(run: Run, batch: Batch) -> Iterator[str]:
    with autocast(run):
        step = run.method.start(batch, ItemNoise(0, range(len(batch.latents))), run.config.steps)
    views = (run.method.student, run.method.teacher)
    networks = [view.backend.network for view in views if hasattr(getattr(view, "backend", None), "network")]
    players = {player.name: list(player.parameters.values()) for player in run.players}
    mine = {id(p) for parameters in players.values() for p in parameters}
    mine |= {id(owner) for owner in run.parts.owners.values()} if run.parts else set()
    strangers = [p for network in networks for p in network.parameters() if id(p) not in mine]
    if any(p.requires_grad for p in strangers):
        yield "the backbone is not frozen: weights that no one trains ask for gradients. Call requires_grad_(False)"
    figures = Figures()
    try:
        for player in run.players:
            if not accumulate(run, player, step, figures):
                continue
            if run.alone:  # several processes would wait for the one that ends here
                read_figures(run, figures)
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
