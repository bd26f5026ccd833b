"""LADD, latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015), and its mixtures.

The student turns a noised teacher latent into a clean one in one call. The discriminator re-noises that result,
passes it through the frozen teacher and judges the teacher's block outputs; real examples are latents that the teacher
sampled itself, with guidance. The other terms are those of `student`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import logit_normal
from ..discriminators.latent import LatentDiscriminator
from ..models.denoiser import Cond, Denoiser
from ..settings import help_of, setting
from . import losses
from .base import Distance, StudentMethod, StudentStep, Term, discriminator_health
from .components import Ingredients
from .config import MethodConfig


@dataclass(frozen=True)
class LADDConfig(MethodConfig):
    """Everything that defines LADD; the loop has settings of its own (`training.loop.TrainConfig`).

    The defaults are the paper's for a flow model above 512 px. For SD 1.5 or SDXL leave student_sigmas, probabilities
    and warmup_probabilities empty, or give levels in the sigmas of that model.
    """

    student_sigmas: tuple[float, ...] = setting(
        (1.0, 0.75, 0.5, 0.25),
        help_of(MethodConfig, "student_sigmas") + " The defaults (LADD section 3) are flow times: for SD 1.5 and SDXL "
        "give other levels, or empty this list and both lists of probabilities.",
    )
    probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    warmup_probabilities: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    warmup_steps: int = 500
    renoise_mean: float = setting(
        1.0,
        "Mean m of the logit-normal distribution from which the discriminator's noise level is drawn. Higher values "
        "judge the layout, lower ones the texture (LADD section 4.1).",
    )
    renoise_std: float = setting(1.0, "Standard deviation s of that logit-normal distribution (LADD section 4.1).")
    shared_renoise: bool = setting(
        True, "Show the discriminator real and fake latents with the same noise; false draws noise for each."
    )
    r1: float = setting(
        0.0, "Weight of the R1 penalty on the inputs of the discriminator's heads (ADD section 3.2); 0 for none."
    )
    approximate_r1: float = setting(
        0.0, "Weight of the approximate R1 penalty, by finite differences (APT, arXiv 2501.08316); 0 for none."
    )
    approximate_r1_sigma: float = setting(
        0.01, "Standard deviation of the noise that the approximate R1 penalty adds; above 0."
    )

    name: ClassVar[str] = "ladd"
    title: ClassVar[str] = "LADD"
    paper: ClassVar[str] = "Sauer et al. 2024, arXiv 2403.12015"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({len(self.student_sigmas), len(self.probabilities), len(self.warmup_probabilities)}) != 1:
            raise ValueError("student_sigmas, probabilities and warmup_probabilities must have the same length")
        if self.approximate_r1_sigma <= 0 or self.renoise_std < 0:
            raise ValueError("approximate_r1_sigma must be above 0 and renoise_std not negative")

    def build(self, ingredients: Ingredients) -> LADD:
        teacher = ingredients.teacher
        taps = list(ingredients.taps) or teacher.backend.default_taps()
        discriminator = LatentDiscriminator.for_teacher(teacher, taps, ingredients.example, **ingredients.head_size())
        return LADD(ingredients.student, teacher, discriminator, taps=taps, config=self, **ingredients.shared())


class LADD(StudentMethod):
    """`StudentMethod` with LADD's discriminator.  taps: teacher blocks it reads."""

    config: LADDConfig

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        discriminator: LatentDiscriminator,
        *,
        taps: Sequence[str],
        config: LADDConfig = LADDConfig(),
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
    ) -> None:
        super().__init__(student, teacher, config, uncond=uncond, guidance=guidance, distance=distance)
        self.discriminator, self.taps = discriminator, list(taps)

    def start(self, batch: Batch, random: ItemNoise, step: int) -> LADDStep:
        """Draw noise levels and run the student once."""
        return LADDStep(self, batch, random, step)

    def terms(self) -> dict[str, Term]:
        return {**super().terms(), "adversarial": self.adversarial_term}

    def adversarial_term(self, step: LADDStep) -> Tensor:
        return self.gan_generator(self._logits(step.fake_maps, step), step.real_logits)

    def discriminator_loss(self, step: LADDStep) -> tuple[Tensor, dict[str, float]]:
        """GAN loss on detached features (reused from the generator phase) plus penalties; heads only."""
        fake = self._logits([m.detach() for m in step.fake_maps], step)
        maps = [m.detach().requires_grad_(self.config.r1 > 0) for m in step.real_maps]
        real = self._logits(maps, step)
        loss = self.gan_discriminator(fake, real)
        logs = {"discriminator": loss.item(), **discriminator_health(fake, real)}
        if self.config.r1:
            penalty = losses.r1_on_head_inputs(real, maps)
            loss, logs["r1"] = loss + self.config.r1 * penalty, penalty.item()
        if self.config.approximate_r1:
            sigma = self.config.approximate_r1_sigma
            noise = step.random.named("approximate r1").normal_like(step.real_noised)
            perturbed = self._logits(step.teacher_maps(step.real_noised + sigma * noise), step)
            penalty = losses.approximate_r1(real, perturbed, sigma)
            loss, logs["approximate_r1"] = loss + self.config.approximate_r1 * penalty, penalty.item()
        return loss, logs

    def _logits(self, maps: list[Tensor], step: LADDStep) -> Tensor:
        return self.discriminator(maps, step.renoise_time, step.batch.cond.pooled)


class LADDStep(StudentStep):
    """A student step with the discriminator's re-noised views of fake and real."""

    method: LADD
    redrawn = ("renoise_time", "renoise", "renoise_sigma", "fake_maps", "real_noised", "real_maps", "real_logits")

    @cached_property
    def renoise_time(self) -> Tensor:
        """Flow time of the discriminator's noise, logit-normal(m, s)."""
        config = self.method.config
        return logit_normal(self.random.named("renoise level"), config.renoise_mean, config.renoise_std).to(
            self.fake.device
        )

    @cached_property
    def renoise(self) -> Tensor:
        return self.random.named("renoise").normal_like(self.batch.latents)

    @cached_property
    def renoise_sigma(self) -> Tensor:
        return self.method.teacher.process.sigma_at_flow_time(self.renoise_time)

    def renoised(self, latents: Tensor, noise: Tensor) -> Tensor:
        return self.method.teacher.process.noise_scaling(self.renoise_sigma, noise, latents)

    def teacher_maps(self, noised: Tensor) -> list[Tensor]:
        method = self.method
        return method.teacher.features(noised, self.renoise_sigma, self.batch.cond, method.taps)

    @cached_property
    def fake_maps(self) -> list[Tensor]:
        """Teacher features of the re-noised student output, with the graph alive down to the student."""
        return self.teacher_maps(self.renoised(self.fake, self.renoise))

    @cached_property
    def real_noised(self) -> Tensor:
        shared, own = self.method.config.shared_renoise, self.random.named("renoise of real")
        noise = self.renoise if shared else own.normal_like(self.batch.latents)
        return self.renoised(self.batch.latents, noise)

    @cached_property
    @torch.no_grad()
    def real_maps(self) -> list[Tensor]:
        return self.teacher_maps(self.real_noised)

    @cached_property
    @torch.no_grad()
    def real_logits(self) -> Tensor | None:
        """Only the relativistic generator compares with real examples."""
        if self.method.config.gan_loss != "relativistic":
            return None
        return self.method._logits(self.real_maps, self)
