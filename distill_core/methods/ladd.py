"""LADD, latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015), and its mixtures.

The student turns a noised teacher latent into a clean one in one call. The discriminator re-noises that result,
passes it through the frozen teacher and judges the teacher's block outputs; real examples are latents that the teacher
sampled itself, with guidance. The student's loss is a weighted list of terms over its one forward:

    adversarial   the discriminator's verdict (LADD section 3)
    pairs         distance to the end of the teacher's own ODE path through this noise (Diffusion2GAN section 3)
    consistency   distance to the student's answer one guided teacher step further down (LCM, arXiv 2310.04378)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .. import losses
from ..data import Batch
from ..denoiser import Denoiser, Guided
from ..discriminators import LatentDiscriminator
from ..noise import ItemNoise
from ..schedules import draw_from_grid, grid_sigmas, logit_normal


@dataclass(frozen=True)
class LADDConfig:
    """Everything that defines the algorithm; the loop has its own settings (`train.TrainConfig`).

    terms: weight of each term of the student's loss.  student_sigmas: the levels the student is trained at, without the
    final 0 (LADD: flow times 1, .75, .5, .25).  probabilities: how often each is drawn, and
    warmup_probabilities during the first warmup_steps (LADD: [0, 0, .5, .5] for 500 steps above 512 px, then
    [.7, .1, .1, .1]).  renoise_mean, renoise_std: the logit-normal (m, s) of the discriminator's noise level.
    shared_renoise: real and fake see the same level and the same noise.  r1, approximate_r1: weights of the penalties.
    state_share: with the pairs term, part of the items at a stored level that start from the teacher's own path there.
    own_share: part of the items below the highest level that start from the student's own one-step sample, noised,
    instead of a teacher latent (the backward simulation of DMD2, arXiv 2405.14867, section 4.5).
    consistency_levels: evenly spaced flow times of the consistency grid; consistency_share: part of the items whose
    student level is drawn from it instead of student_sigmas.
    """

    terms: dict[str, float] = field(default_factory=lambda: {"adversarial": 1.0})
    student_sigmas: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    warmup_probabilities: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    warmup_steps: int = 500
    renoise_mean: float = 1.0
    renoise_std: float = 1.0
    shared_renoise: bool = True
    gan_loss: str = "hinge"
    r1: float = 0.0
    approximate_r1: float = 0.0
    approximate_r1_sigma: float = 0.01
    regression: str = "huber"
    state_share: float = 1.0
    own_share: float = 0.0
    consistency_levels: int = 12
    consistency_share: float = 0.5

    def __post_init__(self) -> None:
        unknown = set(self.terms) - {"adversarial", "pairs", "consistency"}
        if unknown or not any(self.terms.values()):
            raise ValueError(f"terms must weight adversarial, pairs or consistency, got {self.terms}")
        counts = {len(self.student_sigmas), len(self.probabilities), len(self.warmup_probabilities)}
        if len(counts) != 1:
            raise ValueError("student_sigmas, probabilities and warmup_probabilities must have the same length")
        if self.gan_loss not in losses.GAN_LOSSES:
            raise ValueError(f"gan_loss must be one of {list(losses.GAN_LOSSES)}, not {self.gan_loss!r}")
        if self.regression not in losses.REGRESSIONS:
            raise ValueError(f"regression must be one of {list(losses.REGRESSIONS)}, not {self.regression!r}")
        if self.approximate_r1_sigma <= 0 or self.renoise_std < 0:
            raise ValueError("approximate_r1_sigma must be above 0 and renoise_std not negative")

    def weight(self, term: str) -> float:
        return self.terms.get(term, 0.0)


class LADD:
    """One training step's losses. The loop calls ``start``, then ``generator_loss`` and ``discriminator_loss``.

    student, teacher: views of one backbone, or of two.  taps: teacher blocks the discriminator reads.
    uncond, guidance: the empty conditioning (one row) and scale of the teacher, needed by the consistency term.
    """

    def __init__(
        self, student: Denoiser, teacher: Denoiser, discriminator: LatentDiscriminator, taps: Sequence[str],
        config: LADDConfig = LADDConfig(), uncond=None, guidance: float = 1.0,
    ) -> None:  # fmt: skip
        if config.weight("consistency") and uncond is None and guidance != 1.0:
            raise ValueError("the consistency term with guidance needs the empty conditioning (uncond)")
        self.student, self.teacher, self.discriminator, self.taps = student, teacher, discriminator, list(taps)
        self.config = config
        self.guided_teacher = Guided(teacher, uncond, guidance)
        self.gan_generator, self.gan_discriminator = losses.GAN_LOSSES[config.gan_loss]

    @property
    def adversarial(self) -> bool:
        return self.config.weight("adversarial") > 0

    def check(self, batch: Batch, micro_batch: int) -> None:
        """Refuse what would waste a run. Raises ValueError."""
        if self.adversarial and self.config.gan_loss == "hinge" and micro_batch < 2:
            raise ValueError(
                "hinge with a batch of 1 saturates on every item and collapses; use batch_size of at least 2 per "
                "process (gradient accumulation does not help) or gan_loss = 'nonsaturating'"
            )
        if self.config.weight("pairs") and batch.states is None:
            raise ValueError("the pairs term needs a dataset with stored states; set state_sigmas and `cache` again")
        if self.config.weight("pairs") and not self._stored_levels(batch):
            raise ValueError(
                f"the pairs term needs a level that is both trained and stored: trained {self.config.student_sigmas}, "
                f"stored {batch.state_sigmas}"
            )

    def _stored_levels(self, batch: Batch) -> list[float]:
        trained = zip(self.config.student_sigmas, self.config.probabilities, strict=True)
        wanted = [level for level, probability in trained if probability > 0]
        if self.config.weight("consistency"):
            wanted += grid_sigmas(self.student.process, self.config.consistency_levels)[:-1].tolist()
        return [s for s in batch.state_sigmas if any(abs(s - level) <= 1e-4 * s for level in wanted)]

    def start(self, batch: Batch, random: ItemNoise, step: int) -> LADDStep:
        """Draw noise levels and run the student once."""
        return LADDStep(self, batch, random, step)

    def generator_loss(self, step: LADDStep) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the terms; gradients are wanted for the student only."""
        total, logs = step.fake.new_zeros(()), {}
        for name, weight in self.config.terms.items():
            if weight:
                value = getattr(self, f"_{name}")(step)
                total = total + weight * value
                logs[name] = value.item()
        return total, logs | diversity(step.fake, step.batch.latents)

    def _adversarial(self, step: LADDStep) -> Tensor:
        return self.gan_generator(self._logits(step.fake_maps, step), step.real_logits)

    def _pairs(self, step: LADDStep) -> Tensor:
        """Only items that lie on a stored path count; the rest of the batch weighs nothing."""
        distance = losses.REGRESSIONS[self.config.regression](step.fake, step.batch.latents)
        return (distance * step.on_path).mean()

    def _consistency(self, step: LADDStep) -> Tensor:
        """Only items on the consistency grid count: one guided Euler step down, then the student's own answer there."""
        distance = losses.REGRESSIONS[self.config.regression](step.fake, step.consistency_target)
        return (distance * step.on_grid).mean()

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
            noise = step.random.normal_like(step.real_noised)
            perturbed = self._logits(step.teacher_maps(step.real_noised + sigma * noise), step)
            penalty = losses.approximate_r1(real, perturbed, sigma)
            loss, logs["approximate_r1"] = loss + self.config.approximate_r1 * penalty, penalty.item()
        return loss, logs

    def _logits(self, maps: list[Tensor], step: LADDStep) -> Tensor:
        return self.discriminator(maps, step.renoise_time, step.batch.cond.pooled)


class LADDStep:
    """The shared tensors of one step: what several losses need is computed once, when it is first asked for."""

    def __init__(self, method: LADD, batch: Batch, random: ItemNoise, step: int) -> None:
        self.method, self.batch, self.random = method, batch, random
        config, process = method.config, method.student.process
        probabilities = config.warmup_probabilities if step < config.warmup_steps else config.probabilities
        levels = torch.tensor(config.student_sigmas)
        sigma = draw_from_grid(random, levels, probabilities)
        self.on_grid = torch.zeros(len(sigma), dtype=torch.bool)
        if config.weight("consistency"):
            grid = grid_sigmas(process, config.consistency_levels)[:-1]
            self.on_grid = random.uniform() < config.consistency_share
            sigma = torch.where(self.on_grid, draw_from_grid(random, grid, [1.0] * len(grid)), sigma)
        self.noise = random.normal_like(batch.latents)
        self.sigma = sigma.to(batch.latents.device)
        self.x = process.noise_scaling(self.sigma, self.noise, batch.latents)
        self.on_path = torch.zeros(len(sigma), dtype=torch.bool, device=self.x.device)
        if config.weight("pairs"):
            self._move_onto_paths(random.uniform())
        self.on_grid = self.on_grid.to(self.x.device)
        if config.own_share:
            self._start_from_own_samples(random.uniform())
        self.fake = method.student(self.x, self.sigma, batch.cond)

    def _move_onto_paths(self, draw: Tensor) -> None:
        """Where the student's level is one of the stored ones, start from the teacher's state there."""
        use = (draw < self.method.config.state_share).to(self.x.device)
        for index, level in enumerate(self.batch.state_sigmas):
            here = use & ((self.sigma - level).abs() <= 1e-4 * level)
            self.x = torch.where(here.view(-1, 1, 1, 1), self.batch.states[:, index], self.x)
            self.on_path |= here

    @torch.no_grad()
    def _start_from_own_samples(self, draw: Tensor) -> None:
        """Below the highest level, start from the student's own one-step sample: what it will meet when it samples."""
        process, top = self.method.student.process, max(self.method.config.student_sigmas)
        noise = self.random.normal_like(self.batch.latents)
        rows = (
            (draw < self.method.config.own_share).to(self.x.device) & (self.sigma < top) & ~self.on_path & ~self.on_grid
        )
        if not rows.any():
            return
        first = self.sigma.new_full((int(rows.sum()),), top)
        x = process.noise_scaling(first, noise[rows], torch.zeros_like(noise[rows]), max_denoise=True)
        own = self.method.student(x, first, self.batch.cond[rows])
        self.x[rows] = process.noise_scaling(self.sigma[rows], self.noise[rows], own)

    @cached_property
    def renoise_time(self) -> Tensor:
        """Flow time of the discriminator's noise, logit-normal(m, s)."""
        config = self.method.config
        return logit_normal(self.random, config.renoise_mean, config.renoise_std).to(self.fake.device)

    @cached_property
    def renoise(self) -> Tensor:
        return self.random.normal_like(self.batch.latents)

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
        noise = self.renoise if self.method.config.shared_renoise else self.random.normal_like(self.batch.latents)
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

    def renew_noise(self) -> None:
        """Forget the discriminator's noise and features, for another update on fresh ones."""
        for name in (
            "renoise_time",
            "renoise",
            "renoise_sigma",
            "fake_maps",
            "real_noised",
            "real_maps",
            "real_logits",
        ):
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
