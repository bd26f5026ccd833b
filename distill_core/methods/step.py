"""A training step of a student: the levels and inputs that are drawn for a batch, and its one forward on them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick, put, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.process import expand_like
from ..diffusion.schedules import draw_from_grid, draw_whole_schedule, same_level
from ..models.denoiser import Guided

if TYPE_CHECKING:
    from .base import StudentMethod


@dataclass
class Places:
    """Where the items of a batch are, [B] each, on the CPU, where what to compute is decided without asking a device.

    sigma: noise levels.  on_grid: items of the consistency term.  denoises: items of the denoising term alone.
    at_top: at the process' highest level.  state: which of the stored states an item starts from, -1 for none.
    """

    sigma: Tensor
    on_grid: Tensor
    denoises: Tensor
    at_top: Tensor
    state: Tensor


class StudentStep:
    """The shared tensors of one step: what several losses need is computed once, when it is first asked for.

    At the process' highest level the student sees pure noise, whatever the model's schedule leaves of the image there
    (zero terminal SNR, ADD section 3.1): that is where sampling starts.
    """

    redrawn: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, method: StudentMethod, batch: Batch, random: ItemNoise, step: int) -> None:
        self.method, self.batch, self.random, self.number = method, batch, random, step
        config, process, active = method.config, method.student.process, method.active(batch)
        # 1. A noise level for each item, [B]: one of the student's own, of the consistency grid, or of the schedule.
        sigma = self.drawn_levels(random.named("level"))
        on_grid = torch.zeros(len(sigma), dtype=torch.bool)
        if "consistency" in active:
            grid = config.consistency_grid(process)[:-1]  # [K]
            consistency = random.named("consistency")
            on_grid = consistency.uniform() < config.consistency_share
            sigma = torch.where(on_grid, draw_from_grid(consistency, grid, [1.0] * len(grid)), sigma)
        denoises = torch.zeros(len(sigma), dtype=torch.bool)
        if "denoising" in active:
            denoising = random.named("denoising")
            chosen = denoising.uniform() < config.denoising_share
            denoises = (chosen & ~on_grid) | torch.tensor(active == ["denoising"])
            if config.denoising_levels == "all":
                sigma = torch.where(denoises, draw_whole_schedule(denoising, process), sigma)
        at_top = sigma >= process.sigma_max * (1 - 1e-4)
        self.places = Places(sigma, on_grid, denoises, at_top, torch.full(sigma.shape, -1))
        if method.follows_paths(batch):
            self._choose_states(random.named("stored state").uniform())
        # The rows that a discriminator judges: all but those that are denoised, which are at no level of the student's.
        self.judged = [row for row, alone in enumerate(denoises.tolist()) if not alone]
        # 2. The same on the device.
        device = batch.latents.device
        self.sigma, self.on_grid, self.denoises = (upload(v, device) for v in (sigma, on_grid, denoises))  # [B]
        self.at_top, state = upload(at_top, device), upload(self.places.state, device)
        self.on_path = state >= 0
        # 3. Where the student starts, x [B, C, H, W]: the latents noised to that level.
        self.noise = random.named("noise").normal_like(batch.latents)  # [B, C, H, W]
        self.x = process.noise_scaling(self.sigma, self.noise, batch.latents)
        # 4. At the highest level sampling starts from noise alone, so the student never sees an image there.
        pure = process.noise_scaling(self.sigma, self.noise, torch.zeros_like(self.noise), max_denoise=True)
        self.x = torch.where(expand_like(self.at_top, pure), pure, self.x)
        # 5. Items that start elsewhere: on a stored path of the teacher, or from the student's own sample.
        if (self.places.state >= 0).any():
            assert batch.states is not None
            index = state.clamp(min=0).view(-1, *[1] * (batch.states.ndim - 1))  # [B, 1, 1, 1, 1]
            self.x = torch.where(expand_like(self.on_path, self.x), batch.states.take_along_dim(index, 1)[:, 0], self.x)
        if config.own_share:
            self._start_from_own_samples(random.named("own sample"))
        # 6. The one forward of the student, with its graph.
        lora = method.student.lora
        with lora.dropping(random.named("lora dropout")) if lora else nullcontext():
            self.fake = method.student(self.x, self.sigma, batch.cond)

    def drawn_levels(self, random: ItemNoise) -> Tensor:
        """A noise level of the student's own for each item, [B] on the CPU."""
        method = self.method
        return draw_from_grid(random, torch.tensor(method.levels), method.probabilities(self.number, self.batch))

    def _choose_states(self, draw: Tensor) -> None:
        """Where the student's level is one of the stored ones, start from the teacher's state there."""
        assert self.batch.states is not None
        use = (draw < self.method.config.state_share) & ~self.places.denoises
        for index, level in enumerate(self.batch.state_sigmas):
            self.places.state[use & same_level(self.places.sigma, level)] = index

    @torch.no_grad()
    def _start_from_own_samples(self, random: ItemNoise) -> None:
        """Below the highest level, start from the student's own one-step sample: what it will meet when it samples."""
        process, top, places = self.method.student.process, max(self.method.levels), self.places
        chosen, noise = random.uniform() < self.method.config.own_share, random.normal_like(self.batch.latents)
        wanted = chosen & (places.sigma < top) & (places.state < 0) & ~places.on_grid & ~places.denoises
        rows = wanted.nonzero().flatten().tolist()  # R rows of the batch
        if not rows:
            if self.method.student.together:  # other processes may have some, and wait for this one
                self.method.student(self.x[:1], self.sigma[:1], self.batch.cond[:1])
            return
        first, noise = self.sigma.new_full((len(rows),), top), pick(noise, rows)  # [R], [R, C, H, W]
        x = process.noise_scaling(first, noise, torch.zeros_like(noise), max_denoise=True)
        own = self.method.student(x, first, self.batch.cond[rows])
        # Before 2.10 torch would hand these casts of the weights, made without a graph, to the forward with one
        # (pytorch#112583), and the student would learn nothing.
        torch.clear_autocast_cache()
        x = process.noise_scaling(pick(self.sigma, rows), pick(self.noise, rows), own)
        self.x = put(self.x, rows, x)

    @property
    def judged_distinct(self) -> list[int]:
        """Those of `judged` that may enter a statistic."""
        return [row for row in self.batch.distinct if row in self.judged]

    @cached_property
    def guided_teacher(self) -> Guided:
        """The method's, with a guidance for each item where it is drawn."""
        teacher, span = self.method.guided_teacher, self.method.config.guidance_range
        if not span:
            return teacher
        scales = span[0] + (span[1] - span[0]) * self.random.named("guidance").uniform()
        return type(teacher)(teacher.denoiser, teacher.uncond, teacher.scale, upload(scales, self.sigma.device))

    @cached_property
    @torch.no_grad()
    def consistency_target(self) -> Tensor:
        method = self.method
        grid = method.config.consistency_grid(method.student.process)
        # The next level down for each item, [B]: the largest of the grid [K + 1] that is clearly below its own.
        lower = torch.where(grid < self.places.sigma.unsqueeze(1) * (1 - 1e-4), grid, 0.0).amax(1)
        lower = upload(lower, self.sigma.device)
        below = expand_like(lower, self.x)
        x = self.one_level_down(lower)
        # At level 0 the Euler step has already arrived; the network is asked at the lowest level it knows, for nothing.
        answer = method.student(x, lower.clamp(min=grid[-2].item()), self.batch.cond)
        torch.clear_autocast_cache()
        return torch.where(below > 0, answer, x)

    def one_level_down(self, lower: Tensor) -> Tensor:
        """Where the guided teacher's Euler step leads from the items' levels to lower ones [B]."""
        sigma, below = expand_like(self.sigma, self.x), expand_like(lower, self.x)
        denoised = self.guided_teacher(self.x, self.sigma, self.batch.cond)
        return self.x + (self.x - denoised) / sigma * (below - sigma)

    def release(self) -> None:
        """Let go of what an update computed, but for ``kept``, which later updates on this batch use as it is."""
        self.fake = self.fake.detach()
        for name in [name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)]:
            if name not in self.kept:
                del self.__dict__[name]

    def redraw(self) -> None:
        """Forget what the discriminator's update drew, for another update on fresh noise (the streams go on)."""
        for name in self.redrawn:
            self.__dict__.pop(name, None)
        self.fake = self.fake.detach()
