"""DMD2, improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867; DMD: arXiv 2311.18828).

The student's result is noised again, to a random level, and denoised twice: by the guided teacher, which knows what the
data look like, and by the *fake score*, which learns at every step what the student's results look like. Their
difference is the gradient that moves the student's distribution to the teacher's. The fake score is the teacher's
network with a low-rank path of its own on the shared backbone, or a copy of it. Heads on the teacher's features of the
same noised results may judge them, too. The other terms are those of `base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import draw_evenly
from ..discriminators.latent import LatentDiscriminator
from ..models.denoiser import Cond, Denoiser
from ..models.strengths import strengths_of
from ..settings import setting
from . import losses
from .base import Distance, StudentMethod, StudentStep, Term
from .components import Ingredients
from .config import MethodConfig
from .players import Loss, Player, PlayerSettings
from .statistics import discriminator_health

MATCHING = "distribution_matching"


@dataclass(frozen=True)
class DMD2Config(MethodConfig):
    """Everything that defines DMD2, beside the loop's settings."""

    terms: dict[str, float] = setting(
        {MATCHING: 1.0, "adversarial": 0.03},
        "Weight of each term of the student's loss: distribution_matching, adversarial, pairs, consistency, denoising. "
        "A term that is left out, or weighs 0, is not computed.",
        low=0,
        high=1e6,
    )
    gan_loss: str = "nonsaturating"
    own_share: float = 1.0
    time_range: tuple[float, float] = setting(
        (0.02, 0.98),
        "Lowest and highest part (0 to 1) of the model's timesteps at which teacher and fake score are compared, and "
        "at which the discriminator judges; drawn evenly (DMD section 3.2).",
        above=0,
        below=1,
    )
    fake_score_updates: int = setting(
        5,
        "Updates of the fake score for each update of the student, those after the first on the same results with "
        "freshly drawn noise. DMD2 takes 5 (section 4.2); with the pairs term 1 is enough.",
        low=1,
        high=100,
    )
    fake_score_lr: float = setting(
        0.0,
        "Learning rate of the fake score; 0 takes the student's. Its optimizer is the discriminator's.",
        low=0,
        high=100,
    )
    fake_score_rank: int = setting(
        0,
        "Rank of the fake score's path on the shared backbone. 0: that of the student, or a copy of the whole network "
        "where all its weights are trained.",
        low=0,
        high=1024,
    )

    name: ClassVar[str] = "dmd2"
    title: ClassVar[str] = "DMD2"
    paper: ClassVar[str] = "Yin et al. 2024, arXiv 2405.14867"
    heads_see_strengths: ClassVar[bool] = True
    known_terms = (MATCHING, "adversarial", "pairs", "consistency", "denoising")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_range[0] > self.time_range[1]:
            raise ValueError(f"time_range must go from low to high, not {list(self.time_range)}")

    def build(self, ingredients: Ingredients) -> DMD2:
        student, teacher = ingredients.student, ingredients.teacher
        fake_score = self.new_fake_score(ingredients) if self.weight(MATCHING) else None
        taps, discriminator = ingredients.latent_heads() if self.weight("adversarial") else ([], None)
        return DMD2(student, teacher, fake_score, discriminator, taps=taps, config=self, **ingredients.shared())

    def new_fake_score(self, ingredients: Ingredients) -> Denoiser:
        """A view that computes what the teacher computes, until it is trained."""
        lora = ingredients.student.lora
        rank = self.fake_score_rank or (lora.rank if lora else 0)
        if not rank and ingredients.student.together:
            raise ValueError(
                "shard: a second network for the fake score cannot be trained with the student: set fake_score_rank in "
                "[dmd2], 64 for example, or shard = false"
            )
        view = ingredients.components.trainable_teacher(rank, lora.targets if lora else ())
        if (strengths := ingredients.student.strengths) is not None:
            view.strengths = view.backend.new_strengths(strengths.config)
        return view


class DMD2(StudentMethod):
    """`StudentMethod` with a fake score and heads on the teacher's blocks ``taps``, each None where no term needs it.

    fake_score: a trainable view that begins as the teacher.
    """

    config: DMD2Config

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        fake_score: Denoiser | None,
        discriminator: LatentDiscriminator | None,
        *,
        taps: Sequence[str] = (),
        config: DMD2Config = DMD2Config(),
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
    ) -> None:
        super().__init__(student, teacher, config, uncond=uncond, guidance=guidance, distance=distance)
        if config.weight(MATCHING) and uncond is None and guidance != 1.0:
            raise ValueError("the distribution matching term with guidance needs the empty conditioning (uncond)")
        if config.weight(MATCHING) and fake_score is None:
            raise ValueError("the distribution matching term needs a fake score")
        if self.adversarial and discriminator is None:
            raise ValueError("the adversarial term needs a discriminator")
        self.fake_score, self.discriminator, self.taps = fake_score, discriminator, list(taps)

    def players(self, settings: PlayerSettings) -> list[Player]:
        """The student, the discriminator where a term is adversarial, and the fake score."""
        players = super().players(settings)
        if self.fake_score is not None:
            rate = self.config.fake_score_lr or settings.student_lr
            updates = self.config.fake_score_updates
            weights = self.fake_score.trainable()
            players.append(Player("fake_score", self.fake_score_loss, weights, rate, updates, begins_as_teacher=True))
        return players

    def start(self, batch: Batch, random: ItemNoise, step: int) -> DMD2Step:
        """Draw noise levels and run the student once."""
        return DMD2Step(self, batch, random, step)

    def terms(self) -> dict[str, Term]:
        return {**super().terms(), MATCHING: self.matching_term, "adversarial": self.adversarial_term}

    def matching_term(self, step: DMD2Step) -> Tensor:
        """0.5 ||x - stopgrad(x - g)||^2, mean over values: its gradient by the result x is g, `matching_gradient`."""
        gradient = matching_gradient(step.fake.detach(), step.real_answer, step.fake_answer.detach())
        target = step.fake.detach().float() - gradient
        return (0.5 * losses.squared_error(step.fake, target) * ~step.denoises).mean()

    def fake_score_loss(self, step: DMD2Step) -> Loss:
        """The loss a diffusion model is trained by, with the student's results as the data."""
        if not step.fake_answer.requires_grad:  # asked for while only the student's weights had gradients (`sharded`)
            del step.fake_answer
        weight = losses.denoising_weight(self.student.process, step.renoise_sigma)
        error = losses.squared_error(step.fake_answer, step.fake.detach())
        loss = (weight * error * ~step.denoises).mean()
        return loss, {"fake_score": loss.detach()}

    def adversarial_term(self, step: DMD2Step) -> Tensor:
        return self.game(self.gan_generator, step, self._logits(step.fake_maps, step), step.real_logits)

    def discriminator_loss(self, step: DMD2Step) -> Loss:
        """GAN loss on detached features (reused from the generator phase); heads only."""
        fake = self._logits([m.detach() for m in step.fake_maps], step)
        real = self._logits(step.real_maps, step)
        loss = self.game(self.gan_discriminator, step, fake, real)
        rows = step.judged_distinct
        return loss, {"discriminator": loss.detach(), **discriminator_health(pick(fake, rows), pick(real, rows))}

    def _logits(self, maps: list[Tensor], step: DMD2Step) -> Tensor:
        cond, time = step.batch.cond, self.teacher.process.flow_time(step.renoise_sigma)
        return self.discriminator(maps, time, cond.pooled, strengths_of(cond))


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(fake - real) / mean |x - real| of each item (DMD equations 7 and 8), for results x [B, C, H, W].

    real, fake: what the teacher and the fake score make of x noised again.
    """
    scale = (x - real).abs().flatten(1).mean(1)
    scale = scale.clamp(min=1e-6)  # nothing blows up where the teacher would change nothing
    return (fake - real) / scale.view(-1, *[1] * (x.ndim - 1))


class DMD2Step(StudentStep):
    """A student step with its results noised again, and what teacher and fake score make of them."""

    method: DMD2
    redrawn: ClassVar[tuple[str, ...]] = (
        *("renoise_sigma", "renoise", "noised", "answer_and_maps", "real_answer", "fake_answer"),
        *("fake_maps", "real_maps", "real_logits"),
    )

    @cached_property
    def renoise_sigma(self) -> Tensor:
        low, high = self.method.config.time_range
        drawn = draw_evenly(self.random.named("renoise level"), self.method.teacher.process, low, high)
        return upload(self.shifted(drawn), self.fake.device)

    @cached_property
    def renoise(self) -> Tensor:
        return self.random.named("renoise").normal_like(self.batch.latents)

    @cached_property
    def noised(self) -> Tensor:
        """The student's results noised again, with the graph down to the student in its own turn."""
        return self.method.teacher.process.noise_scaling(self.renoise_sigma, self.renoise, self.fake)

    @cached_property
    def fake_answer(self) -> Tensor:
        """The fake score's x0, with its own graph: the student's loss and its own use one forward."""
        assert self.method.fake_score is not None  # the constructor has seen to it
        return self.method.fake_score(self.noised.detach(), self.renoise_sigma, self.batch.cond)

    @cached_property
    def answer_and_maps(self) -> tuple[Tensor, list[Tensor]]:
        """The teacher's x0 with the text, and its features with the graph down to the student: one forward."""
        method = self.method
        answer, maps = method.teacher.with_features(self.noised, self.renoise_sigma, self.batch.cond, method.taps)
        return answer.detach(), maps

    @cached_property
    def real_answer(self) -> Tensor:
        """The guided teacher's x0."""
        guided, noised, sigma = self.guided_teacher, self.noised.detach(), self.renoise_sigma
        answer = self.answer_and_maps[0] if self.method.adversarial else None
        with torch.no_grad():
            if answer is None:
                return guided(noised, sigma, self.batch.cond)
            return guided.around(answer, noised, sigma, self.batch.cond)

    @cached_property
    def fake_maps(self) -> list[Tensor]:
        """Teacher features of the noised results, with the graph alive down to the student."""
        students_turn = self.fake.requires_grad and self.method.fake_score is not None
        return self.answer_and_maps[1] if students_turn else self._maps_of(self.noised)

    @cached_property
    @torch.no_grad()
    def real_maps(self) -> list[Tensor]:
        """The same of real latents, with the same noise."""
        process = self.method.teacher.process
        return self._maps_of(process.noise_scaling(self.renoise_sigma, self.renoise, self.batch.latents))

    def _maps_of(self, noised: Tensor) -> list[Tensor]:
        return self.method.teacher.features(noised, self.renoise_sigma, self.batch.cond, self.method.taps)

    @cached_property
    @torch.no_grad()
    def real_logits(self) -> Tensor | None:
        """Only the relativistic generator compares with real examples."""
        if self.method.config.gan_loss != "relativistic":
            return None
        return self.method._logits(self.real_maps, self)
