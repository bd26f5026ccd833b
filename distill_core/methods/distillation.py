"""The distillation term: distance to what the teacher makes of the student's result, noised again (ADD eq. 4).

It asks for nothing but latents and the teacher, so it holds a student to the teacher where the data are real pictures,
which the teacher has not made (ADD, arXiv 2311.17042; LADD, arXiv 2403.12015, leaves it out for the teacher's own
samples). A method takes it by the three classes here: for its config, for itself and for its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import like
from ..diffusion.noise import ItemNoise
from ..diffusion.process import euler_step, expand_like
from ..models.denoiser import Cond, Denoiser
from ..settings import setting
from . import losses
from .base import Distance, StudentMethod, StudentStep, Term
from .config import MethodConfig

if TYPE_CHECKING:
    from .components import Ingredients


@dataclass(frozen=True)
class DistillationConfig(MethodConfig):
    """Settings of the distillation term."""

    weighting: str = setting(
        "exponential",
        'Weight c(t) of the distillation term over noise levels: "exponential", "sds" or "nfsd" (ADD section 3.3). '
        '"nfsd" also replaces the teacher\'s direction.',
        choices=losses.DISTILLATION_WEIGHTS,
        added=True,
    )
    reduction: str = setting(
        "mean",
        'Squared error of an item in the distillation term: "mean" or "sum" over its values.',
        choices=losses.REDUCTIONS,
        added=True,
    )
    teacher_steps: int = setting(
        1,
        "Euler steps the teacher takes from the noised result for the distillation term (ADD: 1; table 1f).",
        low=1,
        high=100,
        added=True,
    )
    time_range: tuple[float, float] = setting(
        (0.02, 0.98),
        "Lowest and highest flow time (inside 0 to 1) of the noise that the teacher removes in the distillation term, "
        "drawn evenly.",
        above=0,
        below=1,
        added=True,
    )
    nfsd_scale: float = setting(
        7.5,
        'With weighting = "nfsd": weight of the classifier-free part (Katzir et al. 2023, arXiv 2310.17590).',
        low=0,
        high=1000,
        added=True,
    )
    nfsd_negative: str = setting(
        "",
        'With weighting = "nfsd": the prompt of a bad picture, which the high noise levels lead away from (Katzir et '
        'al.: "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, '
        'gloomy"). Empty: the prompt of [prompts] negative.',
        added=True,
    )

    known_terms: ClassVar[tuple[str, ...]] = ("adversarial", "distillation", "pairs", "consistency", "denoising")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_range[0] > self.time_range[1]:
            raise ValueError(f"time_range must go from low to high, not {list(self.time_range)}")

    def shared(self, ingredients: Ingredients) -> dict[str, Any]:
        """The arguments of `Distilling` that are the same for every method. Raises ValueError for a missing encoder."""
        negative, components = None, ingredients.components
        if self.weighting == "nfsd" and self.nfsd_negative:
            if components.encode is None:
                raise ValueError("nfsd_negative needs the model's text encoder, which is not at hand here")
            negative = components.encode(self.nfsd_negative).to(components.device)
        return {**ingredients.shared(), "negative": negative}


class Distilling(StudentMethod):
    """`StudentMethod` with the distillation term.  negative: NFSD's conditioning (one row) of a bad image, None for
    uncond."""

    config: DistillationConfig

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        config: DistillationConfig,
        *,
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
        negative: Cond | None = None,
    ) -> None:
        super().__init__(student, teacher, config, uncond=uncond, guidance=guidance, distance=distance)
        if config.weight("distillation") and uncond is None and (guidance != 1.0 or config.weighting == "nfsd"):
            raise ValueError("the distillation term with guidance, or NFSD, needs the empty conditioning (uncond)")
        self.negative = uncond if negative is None else negative

    def start(self, batch: Batch, random: ItemNoise, step: int) -> DistillationStep:
        """Draw noise levels and run the student once."""
        return DistillationStep(self, batch, random, step)

    def terms(self) -> dict[str, Term]:
        return {**super().terms(), "distillation": self.distillation_term}

    def distillation_term(self, step: DistillationStep) -> Tensor:
        """c(t) d(x, teacher's answer to x noised at t), gradient by x only (ADD eq. 4)."""
        alpha, sigma = losses.signal_and_noise(self.teacher.process, step.teacher_sigma)
        target = self.nfsd_target(step) if self.config.weighting == "nfsd" else step.teacher_answer
        prediction, target = self.compared(step, target)
        square = (prediction - target).float().square().flatten(1)
        per_item = square.mean(1) if self.config.reduction == "mean" else square.sum(1)
        return (losses.DISTILLATION_WEIGHTS[self.config.weighting](alpha, sigma) * per_item * ~step.denoises).mean()

    def compared(self, step: DistillationStep, target: Tensor) -> tuple[Tensor, Tensor]:
        """The student's result and its target, where the distance is taken: here the latents themselves."""
        return step.fake, target

    @torch.no_grad()
    def nfsd_target(self, step: DistillationStep) -> Tensor:
        """The target whose score-distillation gradient is w(t) (delta_D + s delta_C).

        Noise-free score distillation (Katzir et al. 2023, arXiv 2310.17590, eq. 8-9): delta_C = eps(cond) -
        eps(uncond); delta_D = eps(uncond) below timestep 200 of 1000, else eps(uncond) - eps(negative).
        """
        noised, level = step.teacher_noised, step.teacher_sigma
        alpha, sigma = (expand_like(v, noised) for v in losses.signal_and_noise(self.teacher.process, level))
        model_input = self.teacher.process.calculate_input(level, noised)

        def eps(cond: Cond | None) -> Tensor:
            assert cond is not None  # the constructor has seen to it
            return (model_input - alpha * self.teacher(noised, level, cond.rows_for(step.batch.cond))) / sigma

        without = eps(self.guided_teacher.uncond)
        # The paper's 200 of 1000 timesteps: flow models count them in flow time, others in their own table.
        timestep, last = (
            self.teacher.process.timestep(v) for v in (level, level.new_full((1,), self.teacher.process.sigma_max))
        )
        low = expand_like(timestep / last < 0.2, noised)
        denoising = torch.where(low, without, without - eps(self.negative))
        direction = denoising + self.config.nfsd_scale * (eps(step.batch.cond) - without)
        return step.fake - sigma / alpha * direction


class DistillationStep(StudentStep):
    """A student step with the teacher's answer to the student's result."""

    method: Distilling

    @cached_property
    def teacher_time(self) -> Tensor:
        """Flow time of the noise that the teacher removes, evenly drawn before any shift."""
        low, high = self.method.config.time_range
        return like(self.shifted(low + (high - low) * self.random.named("teacher level").uniform()), self.fake)

    @cached_property
    def teacher_sigma(self) -> Tensor:
        return self.method.teacher.process.sigma_at_flow_time(self.teacher_time)

    @cached_property
    def teacher_noised(self) -> Tensor:
        noise = self.random.named("teacher noise").normal_like(self.fake)
        return self.method.teacher.process.noise_scaling(self.teacher_sigma, noise, self.fake.detach())

    @cached_property
    @torch.no_grad()
    def teacher_answer(self) -> Tensor:
        """The guided teacher's x0 after ``teacher_steps`` Euler steps, evenly spaced in flow time."""
        method, x, sigma = self.method, self.teacher_noised, self.teacher_sigma
        steps = method.config.teacher_steps
        denoised = self.guided_teacher(x, sigma, self.batch.cond)
        for left in range(steps - 1, 0, -1):
            lower = method.teacher.process.sigma_at_flow_time(self.teacher_time * left / steps)
            x, sigma = euler_step(x, denoised, sigma, lower), lower
            denoised = self.guided_teacher(x, sigma, self.batch.cond)
        return denoised
