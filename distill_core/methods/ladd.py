"""LADD, latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015), and its mixtures.

The student turns a noised teacher latent into a clean one in one call. The discriminator re-noises that result,
passes it through the frozen teacher and judges the teacher's block outputs; real examples are latents that the teacher
sampled itself, with guidance. On real pictures the distillation term (`distillation`) holds the student to the teacher.
The other terms are those of `base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import logit_normal
from ..discriminators.latent import LatentDiscriminator
from ..models.denoiser import Cond, Denoiser
from ..models.strengths import strengths_of
from ..settings import setting
from . import losses
from .base import Distance, Term
from .components import Ingredients
from .distillation import DistillationConfig, DistillationStep, Distilling
from .players import Loss
from .statistics import discriminator_health

FIRST_LEVEL = 0.7  # how often the highest level is drawn (LADD section 3)
WARMED_UP_ABOVE = 512  # pixels a side (LADD section 3)


@dataclass(frozen=True)
class LADDConfig(DistillationConfig):
    """Everything that defines LADD; the loop has settings of its own (`training.loop.TrainConfig`).

    The defaults are the paper's on the model's own four levels (1, .75, .5, .25 for a flow model without a shift).
    """

    probabilities: tuple[float, ...] = setting(
        (),
        "How often each of student_sigmas is drawn, in the same order; they need not sum to 1. Empty: the highest in "
        "0.7 of the cases, the others equally often (LADD section 3).",
        low=0,
        high=1e6,
    )
    warmup_probabilities: tuple[float, ...] = setting(
        (),
        "Replaces probabilities during the first warmup_steps. Empty: pictures above 512 x 512 pixels begin with the "
        "lower half of the levels, equally often (LADD section 3), and smaller ones without a warm-up.",
        low=0,
        high=1e6,
    )
    warmup_steps: int = 500
    renoise_mean: float = setting(
        1.0,
        "Mean m of the logit-normal distribution from which the discriminator's noise level is drawn. Higher values "
        "judge the layout, lower ones the texture (LADD section 4.1).",
        low=-20,
        high=20,
    )
    renoise_std: float = setting(
        1.0, "Standard deviation s of that logit-normal distribution (LADD section 4.1).", low=0, high=20
    )
    shared_renoise: bool = setting(
        True, "Show the discriminator real and fake latents with the same noise; false draws noise for each."
    )
    r1: float = setting(
        0.0,
        "Weight of the R1 penalty on the inputs of the discriminator's heads (ADD section 3.2); 0 for none.",
        low=0,
        high=1e6,
    )
    approximate_r1: float = setting(
        0.0,
        "Weight of the approximate R1 penalty, the squared change of the verdict when a little noise is added (APT, "
        "arXiv 2501.08316, equation 9; there 100); 0 for none.",
        low=0,
        high=1e6,
    )
    approximate_r1_sigma: float = setting(
        0.01,
        "Standard deviation of the noise that the approximate R1 penalty adds; above 0 (APT: 0.01). In bfloat16 and "
        "float16, whose rounding would hide it, at least 0.1 is added and the penalty scaled back.",
        above=0,
        high=100,
    )

    name: ClassVar[str] = "ladd"
    title: ClassVar[str] = "LADD"
    paper: ClassVar[str] = "Sauer et al. 2024, arXiv 2403.12015"
    heads_see_strengths: ClassVar[bool] = True

    def build(self, ingredients: Ingredients) -> LADD:
        taps, discriminator = ingredients.latent_heads() if self.weight("adversarial") else ([], None)
        student, teacher = ingredients.student, ingredients.teacher
        return self.method_class()(student, teacher, discriminator, taps=taps, config=self, **self.shared(ingredients))

    def method_class(self) -> type[LADD]:
        """What `build` makes."""
        return LADD


class LADD(Distilling):
    """`Distilling` with LADD's discriminator (None where no term is adversarial).  taps: teacher blocks it reads."""

    config: LADDConfig

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        discriminator: LatentDiscriminator | None,
        *,
        taps: Sequence[str],
        config: LADDConfig = LADDConfig(),
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
        negative: Cond | None = None,
    ) -> None:
        shared: dict[str, Any] = {"uncond": uncond, "guidance": guidance, "distance": distance, "negative": negative}
        super().__init__(student, teacher, config, **shared)
        if self.adversarial and discriminator is None:
            raise ValueError("the adversarial term needs a discriminator")
        self.discriminator, self.taps = discriminator, list(taps)

    def probabilities(self, step: int, batch: Batch) -> tuple[float, ...]:
        """How often each level is drawn at a step: the paper's where the settings do not say."""
        config, count = self.config, len(self.levels)
        if step < config.warmup_steps and not config.warmup_probabilities and self._is_large(batch):
            return (0.0,) * (count // 2) + (1.0,) * (count - count // 2)
        others = (1 - FIRST_LEVEL) / max(1, count - 1)
        return super().probabilities(step, batch) if self._are_given(step) else (FIRST_LEVEL, *[others] * (count - 1))

    def _are_given(self, step: int) -> bool:
        config = self.config
        return bool(config.probabilities or step < config.warmup_steps and config.warmup_probabilities)

    def _is_large(self, batch: Batch) -> bool:
        height, width = batch.latents.shape[-2:]
        return height * width * self.student.backend.limits().pixels ** 2 > WARMED_UP_ABOVE**2

    def start(self, batch: Batch, random: ItemNoise, step: int) -> LADDStep:
        """Draw noise levels and run the student once."""
        return LADDStep(self, batch, random, step)

    def terms(self) -> dict[str, Term]:
        return {**super().terms(), "adversarial": self.adversarial_term}

    def adversarial_term(self, step: LADDStep) -> Tensor:
        return self.game(self.gan_generator, step, self._logits(step.fake_maps, step), step.real_logits)

    def discriminator_loss(self, step: LADDStep) -> Loss | None:
        """GAN loss on detached features (reused from the generator phase) plus penalties; heads only."""
        fake = self._logits([m.detach() for m in step.fake_maps], step)
        maps = [m.detach().requires_grad_(self.config.r1 > 0) for m in step.real_maps]
        real = self._logits(maps, step)
        loss = self.game(self.gan_discriminator, step, fake, real)
        rows = step.judged_distinct
        logs = {"discriminator": loss.detach(), **discriminator_health(pick(fake, rows), pick(real, rows))}
        if self.config.r1:
            penalty = losses.r1_on_head_inputs(real, maps)
            loss, logs["r1"] = loss + self.config.r1 * penalty, penalty.detach()
        if self.config.approximate_r1:
            sigma = self.config.approximate_r1_sigma
            wide = losses.seen_noise(sigma, step.real_maps)
            noise = step.random.named("approximate r1").normal_like(step.real_noised)
            perturbed = self._logits(step.teacher_maps(step.real_noised + wide * noise), step)
            penalty = losses.approximate_r1(real, perturbed) * (sigma / wide) ** 2
            loss, logs["approximate_r1"] = loss + self.config.approximate_r1 * penalty, penalty.detach()
        return loss, logs

    def _logits(self, maps: list[Tensor], step: LADDStep) -> Tensor:
        cond = step.batch.cond
        return self.discriminator(maps, step.renoise_time, cond.pooled, strengths_of(cond))


class LADDStep(DistillationStep):
    """A student step with the discriminator's re-noised views of fake and real."""

    method: LADD
    redrawn: ClassVar[tuple[str, ...]] = (
        *("renoise_time", "renoise", "renoise_sigma"),
        *("fake_maps", "real_noised", "real_maps", "real_logits"),
    )

    @cached_property
    def renoise_time(self) -> Tensor:
        """Flow time of the discriminator's noise, logit-normal(m, s); m + ln a where levels are shifted by a."""
        config = self.method.config
        drawn = logit_normal(self.random.named("renoise level"), config.renoise_mean, config.renoise_std)
        return upload(self.shifted(drawn), self.fake.device)

    @cached_property
    def renoise(self) -> Tensor:
        return self.random.named("renoise").normal_like(self.batch.latents)

    @cached_property
    def renoise_sigma(self) -> Tensor:
        return self.method.teacher.process.sigma_at_flow_time(self.renoise_time)

    def shown(self, latents: Tensor) -> Tensor:
        """What the discriminator's view of latents begins as."""
        return latents

    def renoised(self, latents: Tensor, noise: Tensor) -> Tensor:
        return self.method.teacher.process.noise_scaling(self.renoise_sigma, noise, latents)

    def teacher_maps(self, noised: Tensor) -> list[Tensor]:
        method = self.method
        return method.teacher.features(noised, self.renoise_sigma, self.batch.cond, method.taps)

    @cached_property
    def fake_maps(self) -> list[Tensor]:
        """Teacher features of the re-noised student output, with the graph alive down to the student."""
        return self.teacher_maps(self.renoised(self.shown(self.fake), self.renoise))

    @cached_property
    def real_noised(self) -> Tensor:
        shared, own = self.method.config.shared_renoise, self.random.named("renoise of real")
        noise = self.renoise if shared else own.normal_like(self.batch.latents)
        return self.renoised(self.shown(self.batch.latents), noise)

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
