"""Diffusion2GAN (Kang et al. 2024, arXiv 2405.05967): one step, as a paired translation from noise to latent.

The dataset stores the noise in which each teacher path began. The student's answer to that noise is compared with the
end of the path by a regression loss (E-LatentLPIPS in the paper), and judged by a trainable network initialised from
the teacher, which sees the noise and the text as well. The other terms are those of `distillation` and `base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.dataset import Batch
from ..devices import pick, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.process import expand_like
from ..discriminators.network import NetworkDiscriminator
from ..models.denoiser import Cond, Denoiser
from ..settings import help_of, setting
from . import losses
from .base import Distance, Term
from .components import Ingredients
from .config import MethodConfig
from .distillation import DistillationConfig, DistillationStep, Distilling
from .players import Loss
from .statistics import discriminator_health

R1_NOISE = 0.01  # of `Diffusion2GAN.r1_by_difference`, in float32
# Above them a double backward would take many times the memory of the step. It keeps a matrix of all positions against
# all for each layer, and where the network's weights are not in float32, a copy of each that is.
R1_POSITIONS = 32 * 32  # of a latent
R1_WEIGHTS = 200_000_000  # of the network


@dataclass(frozen=True)
class Diffusion2GANConfig(DistillationConfig):
    """Everything that defines Diffusion2GAN. The student is trained at one level, the model's highest."""

    terms: dict[str, float] = setting({"pairs": 1.0, "adversarial": 0.1}, help_of(MethodConfig, "terms"))
    gan_loss: str = "nonsaturating"
    mix_share: float = setting(
        0.25,
        "Part (0 to below 1) of the fakes that are replaced, for the discriminator, by the target of another noise and "
        "text: mix-and-match (Diffusion2GAN section 3).",
        low=0,
        below=1,
    )
    r1: float = setting(
        1e-3,
        "Weight of the R1 penalty on the discriminator's input, taken on one real item; 0 for none.",
        low=0,
        high=1e6,
    )
    r1_every: int = setting(
        16,
        "Steps between two R1 penalties; each counts as often as it was left out (lazy regularisation, StyleGAN2).",
        low=1,
        high=100000,
    )
    r1_by: str = setting(
        "auto",
        'How R1 is taken: "gradient", exactly, by a double backward that keeps every attention matrix; "difference", '
        'from how much a little noise changes the verdict, which takes no more memory than the step; "auto": by the '
        "gradient for latents of up to 32 x 32 positions in networks of up to 0.2 billion weights.",
        choices=("auto", "gradient", "difference"),
        added=True,
    )
    critic: str = setting(
        "copy",
        'The network under the discriminator: "copy", a second one as in the paper, or "lora", low-rank weights on the '
        "shared one, which needs far less memory.",
        choices=("copy", "lora"),
    )
    critic_rank: int = setting(32, 'Rank of those low-rank weights (critic = "lora").', low=1, high=1024)
    critic_rate: float = setting(
        0.1,
        "Learning rate of that network, as a part of the learning rate of the discriminator's heads.",
        low=0,
        high=100,
    )
    critic_time: float = setting(
        0.0, "Flow time (0 to below 1) that this network is told; 0 says that its input is clean.", low=0, below=1
    )
    noise_condition: bool = setting(True, "Let the discriminator see the noise the student started from.")
    multi_scale: bool = setting(
        True, "Feed the discriminator latents at several scales, and read it out at several scales."
    )

    name: ClassVar[str] = "diffusion2gan"
    title: ClassVar[str] = "Diffusion2GAN"
    paper: ClassVar[str] = "Kang et al. 2024, arXiv 2405.05967"
    default_levels = 1
    checks_paths = True

    def build(self, ingredients: Ingredients) -> Diffusion2GAN:
        discriminator = None
        if self.weight("adversarial"):
            backbone = ingredients.components.trainable_teacher(self.critic_rank if self.critic == "lora" else 0)
            taps, inputs = ingredients.teacher.backend.multi_scale_taps()
            discriminator = NetworkDiscriminator.for_backbone(
                backbone,
                ingredients.taps or taps,
                inputs,
                batch=ingredients.example,
                multi_scale=self.multi_scale,
                with_noise=self.noise_condition,
                flow_time=self.critic_time,
                **ingredients.head_size(),
            )
        student, teacher = ingredients.student, ingredients.teacher
        return Diffusion2GAN(student, teacher, discriminator, config=self, **self.shared(ingredients))


class Diffusion2GAN(Distilling):
    """`Distilling` with a trainable network as its discriminator (None where no term is adversarial)."""

    config: Diffusion2GANConfig

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        discriminator: NetworkDiscriminator | None,
        *,
        config: Diffusion2GANConfig = Diffusion2GANConfig(),
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
        negative: Cond | None = None,
    ) -> None:
        shared: dict[str, Any] = {"uncond": uncond, "guidance": guidance, "distance": distance, "negative": negative}
        super().__init__(student, teacher, config, **shared)
        if self.adversarial and discriminator is None:
            raise ValueError("the adversarial term needs a discriminator")
        self.discriminator = discriminator

    def discriminator_lr_scale(self, name: str) -> float:
        """Its network learns at another rate than its heads."""
        return self.config.critic_rate if name.startswith("trained.") else 1.0

    def check(self, batch: Batch, micro_batch: int) -> None:
        """Refuse what would waste a run. Raises ValueError."""
        super().check(batch, micro_batch)
        if self.adversarial and self.config.mix_share and micro_batch < 2:
            raise ValueError("mix-and-match takes its targets from the rest of the batch; use batch_size of at least 2")
        if self.adversarial and self.config.r1 and self.config.r1_by == "gradient" and self.teacher.together:
            raise ValueError(
                'r1_by = "gradient" needs a double backward, and weights that are shared out (shard = true) are gone '
                'by then: set r1_by = "difference"'
            )

    def start(self, batch: Batch, random: ItemNoise, step: int) -> Diffusion2GANStep:
        """Draw noise levels and run the student once."""
        return Diffusion2GANStep(self, batch, random, step)

    def _logits(self, latents: Tensor, step: Diffusion2GANStep) -> Tensor:
        return self.discriminator(latents, step.unit_noise, step.batch.cond)

    def terms(self) -> dict[str, Term]:
        return {**super().terms(), "adversarial": self.adversarial_term}

    def adversarial_term(self, step: Diffusion2GANStep) -> Tensor:
        return self.game(self.gan_generator, step, self._logits(step.fake, step), step.real_logits)

    def discriminator_loss(self, step: Diffusion2GANStep) -> Loss:
        """GAN loss with mismatched targets among the fakes, and the lazy penalty; the discriminator only."""
        fake, real = self._logits(step.mixed, step), self._logits(step.batch.latents, step)
        loss = self.game(self.gan_discriminator, step, fake, real)
        rows = step.judged_distinct
        own = [row for row in rows if not step.swapped[row]]
        logs = {"discriminator": loss.detach(), **discriminator_health(pick(fake, own), pick(real, rows))}
        if self.config.r1 and step.number % self.config.r1_every == 0:
            penalty = self.r1(step)
            loss, logs["r1"] = loss + self.config.r1_every * self.config.r1 * penalty, penalty.detach()
        return loss, logs

    def r1(self, step: Diffusion2GANStep) -> Tensor:
        """R1 of one real item, taken as `r1_by` says."""
        by_gradient = self.config.r1_by == "gradient"
        if self.config.r1_by == "auto" and not self.teacher.together:
            positions = step.batch.latents.shape[-2:].numel()
            weights = sum(p.numel() for p in self.teacher.backend.network.parameters())
            by_gradient = positions <= R1_POSITIONS and weights <= R1_WEIGHTS
        return self.single_sample_r1(step) if by_gradient else self.r1_by_difference(step)

    def r1_by_difference(self, step: Diffusion2GANStep) -> Tensor:
        """An estimate of `single_sample_r1` without a double backward: (D(x + s n) - D(x))^2 / s^2, unit noise n.

        Its mean over the noise is the squared gradient, to first order in s (APT, arXiv 2501.08316, equation 9).
        """
        real, noise, cond = step.batch.latents[:1].detach(), step.unit_noise[:1], step.batch.cond[:1]
        sigma = losses.seen_noise(R1_NOISE, [next(self.teacher.backend.network.parameters())])
        moved = real + sigma * step.random.named("r1").normal_like(step.batch.latents)[:1]
        clean, changed = (self.discriminator(latents, noise, cond) for latents in (real, moved))
        return losses.approximate_r1(clean, changed) / sigma**2

    def single_sample_r1(self, step: Diffusion2GANStep) -> Tensor:
        """R1 of the batch's first real item. Double backward needs plain attention and full precision."""
        real = step.batch.latents[:1].detach().float().requires_grad_()
        plainly = self.discriminator.backbone.backend.switch.plainly()
        with plainly, sdpa_kernel(SDPBackend.MATH), torch.autocast(real.device.type, enabled=False):
            logits = self.discriminator(real, step.unit_noise[:1].float(), step.batch.cond[:1])
            return losses.r1_on_head_inputs(logits, [real])


class Diffusion2GANStep(DistillationStep):
    """A student step with what the discriminator is shown beside the fake."""

    method: Diffusion2GAN
    redrawn = ("swapped", "mixed", "real_logits")

    @cached_property
    def unit_noise(self) -> Tensor:
        """What the student started from, at unit variance: the stored noise of the teacher's path."""
        return self.method.student.process.calculate_input(self.sigma, self.x)

    @cached_property
    def swapped(self) -> Tensor:
        """Which rows of `mixed` are not the student's, [B] on the CPU. A repeated item is no mismatch for itself."""
        swapped = self.random.named("mix").uniform() < self.method.config.mix_share
        first = torch.tensor(self.batch.first)
        return swapped & (first != first.roll(1, 0))

    @cached_property
    def mixed(self) -> Tensor:
        """The student's results, some replaced by the target of the next item; noise and text stay as they are."""
        other = self.batch.latents.roll(1, 0)
        swapped = upload(self.swapped, other.device)
        return torch.where(expand_like(swapped, other), other, self.fake.detach())

    @cached_property
    @torch.no_grad()
    def real_logits(self) -> Tensor | None:
        """Only the relativistic generator compares with real examples."""
        if self.method.config.gan_loss != "relativistic":
            return None
        return self.method._logits(self.batch.latents, self)
