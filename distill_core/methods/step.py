"""One training step: the noise levels that are drawn, the student's one forward, and what several losses need of it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import draw_from_grid, grid_sigmas

if TYPE_CHECKING:
    from .base import StudentMethod


class StudentStep:
    """The shared tensors of one step: what several losses need is computed once, when it is first asked for.

    At the process' highest level the student sees pure noise, whatever the model's schedule leaves of the image there
    (zero terminal SNR, ADD section 3.1): that is where sampling starts.
    """

    redrawn: ClassVar[tuple[str, ...]] = ()

    def __init__(self, method: StudentMethod, batch: Batch, random: ItemNoise, step: int) -> None:
        self.method, self.batch, self.random, self.number = method, batch, random, step
        config, process = method.config, method.student.process
        sigma = draw_from_grid(random.named("level"), torch.tensor(method.levels), method.probabilities(step))
        self.on_grid = torch.zeros(len(sigma), dtype=torch.bool)
        if config.weight("consistency"):
            grid = grid_sigmas(process, config.consistency_levels)[:-1]
            consistency = random.named("consistency")
            self.on_grid = consistency.uniform() < config.consistency_share
            sigma = torch.where(self.on_grid, draw_from_grid(consistency, grid, [1.0] * len(grid)), sigma)
        self.noise = random.named("noise").normal_like(batch.latents)  # [B, C, H, W]
        self.sigma = sigma.to(batch.latents.device)  # [B]
        self.x = process.noise_scaling(self.sigma, self.noise, batch.latents)
        # At the highest level sampling starts from noise alone, so the student never sees an image there.
        self.at_top = self.sigma >= process.sigma_max * (1 - 1e-4)
        pure = process.noise_scaling(self.sigma, self.noise, torch.zeros_like(self.noise), max_denoise=True)
        self.x = torch.where(self.at_top.view(-1, 1, 1, 1), pure, self.x)
        self.on_path = torch.zeros(len(sigma), dtype=torch.bool, device=self.x.device)
        if config.weight("pairs"):
            self._move_onto_paths(random.named("stored state").uniform())
        self.on_grid = self.on_grid.to(self.x.device)
        if config.own_share:
            self._start_from_own_samples(random.named("own sample"))
        self.fake = method.student(self.x, self.sigma, batch.cond)

    def _move_onto_paths(self, draw: Tensor) -> None:
        """Where the student's level is one of the stored ones, start from the teacher's state there."""
        use = (draw < self.method.config.state_share).to(self.x.device)
        for index, level in enumerate(self.batch.state_sigmas):
            here = use & ((self.sigma - level).abs() <= 1e-4 * level)
            self.x = torch.where(here.view(-1, 1, 1, 1), self.batch.states[:, index], self.x)
            self.on_path |= here

    @torch.no_grad()
    def _start_from_own_samples(self, random: ItemNoise) -> None:
        """Below the highest level, start from the student's own one-step sample: what it will meet when it samples."""
        process, top = self.method.student.process, max(self.method.levels)
        chosen = (random.uniform() < self.method.config.own_share).to(self.x.device)  # [B]
        noise = random.normal_like(self.batch.latents)
        rows = chosen & (self.sigma < top) & ~self.on_path & ~self.on_grid
        if not rows.any():
            return
        first = self.sigma.new_full((int(rows.sum()),), top)
        x = process.noise_scaling(first, noise[rows], torch.zeros_like(noise[rows]), max_denoise=True)
        own = self.method.student(x, first, self.batch.cond[rows])
        self.x[rows] = process.noise_scaling(self.sigma[rows], self.noise[rows], own)

    @cached_property
    @torch.no_grad()
    def consistency_target(self) -> Tensor:
        method = self.method
        grid = grid_sigmas(method.student.process, method.config.consistency_levels).to(self.sigma)
        lower = torch.where(grid < self.sigma.unsqueeze(1) * (1 - 1e-4), grid, 0.0).amax(1)
        sigma = self.sigma.view(-1, 1, 1, 1)
        below = lower.view(-1, 1, 1, 1)
        denoised = method.guided_teacher(self.x, self.sigma, self.batch.cond)
        x = self.x + (self.x - denoised) / sigma * (below - sigma)
        answer = method.student(x, lower.clamp(min=grid[-2].item()), self.batch.cond)
        return torch.where(below > 0, answer, x)

    def redraw(self) -> None:
        """Forget what the discriminator's update drew, for another update on fresh noise (the streams go on)."""
        for name in self.redrawn:
            self.__dict__.pop(name, None)
        self.fake = self.fake.detach()


def discriminator_health(fake: Tensor, real: Tensor) -> dict[str, float]:
    """By the mean logit of each item: accuracy, the gap between real and fake, and the spread among items of a kind."""
    fake, real = fake.detach().mean(1), real.detach().mean(1)
    correct = ((fake < 0).float().mean() + (real > 0).float().mean()) / 2
    health = {"accuracy": correct.item(), "logit_gap": (real.mean() - fake.mean()).item()}
    if len(fake) > 1:
        health["logit_spread"] = ((fake.var() + real.var()) / 2).sqrt().item()
    return health


def diversity(fake: Tensor, real: Tensor) -> dict[str, float]:
    """How much the items of a batch differ from each other, as a part of how much the real ones do."""
    if len(fake) < 2:
        return {}
    return {"diversity": (fake.detach().std(0).mean() / real.std(0).mean().clamp(min=1e-6)).item()}
