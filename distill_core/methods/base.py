"""What all methods share: the student's one forward of a step, and the terms of its loss that need no discriminator.

A student's loss is a weighted list of terms over that forward. Every method knows

    pairs         distance to the end of the teacher's own ODE path through this noise (Diffusion2GAN section 3)
    consistency   distance to the student's answer one guided teacher step further down (LCM, arXiv 2310.04378)

and adds ``adversarial`` with its own discriminator; a combination of methods is a choice of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import draw_from_grid, grid_sigmas
from ..models.denoiser import Denoiser, Guided
from ..settings import setting
from . import losses

Distance = Callable[[Tensor, Tensor, ItemNoise], Tensor]


@dataclass(frozen=True)
class MethodConfig:
    """Settings of the student's step that all methods share."""

    terms: dict[str, float] = setting(
        {"adversarial": 1.0},
        "Weight of each term of the student's loss: adversarial, pairs, consistency and, for ADD, distillation. "
        "A term that is left out, or weighs 0, is not computed.",
    )
    student_sigmas: tuple[float, ...] = setting(
        (),
        "Noise levels the student is trained at, highest first and without the final 0, in the model's own sigmas: up "
        "to 1 for flow models (SD3, FLUX), up to 14.6 for SD 1.5 and SDXL. Empty: evenly spaced steps of the model's "
        "own schedule, four of them (Diffusion2GAN: one).",
    )
    probabilities: tuple[float, ...] = setting(
        (),
        "How often each of student_sigmas is drawn, in the same order; they need not sum to 1. Empty: equally often.",
    )
    warmup_probabilities: tuple[float, ...] = setting(
        (), "Replaces probabilities during the first warmup_steps. Empty: no difference."
    )
    warmup_steps: int = setting(0, "Steps during which warmup_probabilities hold.")
    gan_loss: str = setting(
        "hinge",
        'Adversarial loss: "hinge" (StyleGAN-T; ADD equations 2 and 3), "nonsaturating" (Goodfellow et al. 2014) or '
        '"relativistic" (Jolicoeur-Martineau 2018).',
    )
    regression: str = setting(
        "huber",
        'Distance used by the pairs and consistency terms: "huber" (pseudo-Huber, Song and Dhariwal 2023) or "mse". '
        "A perceptual loss named by [model] perceptual takes its place.",
    )
    state_share: float = setting(
        1.0,
        "With the pairs term: part (0 to 1) of the items at a stored noise level that start from the teacher's own "
        "path there. The others start from a noised latent, and the pairs term ignores them.",
    )
    own_share: float = setting(
        0.0,
        "Part (0 to 1) of the items below the highest level that start from the student's own one-step sample, noised, "
        "instead of a teacher latent (backward simulation; DMD2, arXiv 2405.14867, section 4.5).",
    )
    consistency_levels: int = setting(
        12, "Number of evenly spaced levels on which the consistency term works (LCM, arXiv 2310.04378)."
    )
    consistency_share: float = setting(
        0.5, "With the consistency term: part (0 to 1) of the items whose level is one of those, not of student_sigmas."
    )

    known_terms: ClassVar[tuple[str, ...]] = ("adversarial", "pairs", "consistency")
    default_levels: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if set(self.terms) - set(self.known_terms) or not any(self.terms.values()):
            raise ValueError(f"terms must weight some of {', '.join(self.known_terms)}, got {self.terms}")
        given = [len(p) for p in (self.probabilities, self.warmup_probabilities) if p]
        if len({*given, *([len(self.student_sigmas)] if self.student_sigmas else [])}) > 1:
            raise ValueError("student_sigmas, probabilities and warmup_probabilities must have the same length")
        if self.gan_loss not in losses.GAN_LOSSES:
            raise ValueError(f"gan_loss must be one of {list(losses.GAN_LOSSES)}, not {self.gan_loss!r}")
        if self.regression not in losses.REGRESSIONS:
            raise ValueError(f"regression must be one of {list(losses.REGRESSIONS)}, not {self.regression!r}")

    def weight(self, term: str) -> float:
        return self.terms.get(term, 0.0)

    def levels(self, process) -> tuple[float, ...]:
        """The student's levels for a model's noise process. Raises ValueError for one that the model cannot have."""
        levels = self.student_sigmas or tuple(grid_sigmas(process, self.default_levels)[:-1].tolist())
        if max(levels) > process.sigma_max * (1 + 1e-4):
            raise ValueError(f"student_sigmas {levels} go beyond this model's highest level, {process.sigma_max:.4g}")
        return levels


class StudentMethod:
    """One training step's losses. The loop calls ``start``, then ``generator_loss`` and ``discriminator_loss``.

    student, teacher: views of one backbone, or of two.  uncond, guidance: the empty conditioning (one row) and scale of
    the teacher.  distance: ``(prediction, target, random) -> [B]`` of the pairs and consistency terms, e.g. a
    perceptual loss whose transforms are drawn per item from ``random``; None for ``config.regression``.
    """

    discriminator: torch.nn.Module | None = None

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        config: MethodConfig,
        uncond=None,
        guidance: float = 1.0,
        distance: Distance | None = None,
    ) -> None:
        if config.weight("consistency") and uncond is None and guidance != 1.0:
            raise ValueError("the consistency term with guidance needs the empty conditioning (uncond)")
        self.student, self.teacher, self.config = student, teacher, config
        self.levels = config.levels(student.process)
        self.guided_teacher = Guided(teacher, uncond, guidance)
        self.gan_generator, self.gan_discriminator = losses.GAN_LOSSES[config.gan_loss]
        simple = losses.REGRESSIONS[config.regression]
        self.distance = distance or (lambda prediction, target, random: simple(prediction, target))

    @property
    def adversarial(self) -> bool:
        return self.config.weight("adversarial") > 0

    def rate_of(self, name: str) -> float:
        """Learning rate of a discriminator's parameter relative to the loop's ``discriminator_lr``."""
        return 1.0

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
                f"the pairs term needs a level that is both trained and stored: trained {self.levels}, "
                f"stored {batch.state_sigmas}"
            )

    def _stored_levels(self, batch: Batch) -> list[float]:
        trained = zip(self.levels, self.probabilities(self.config.warmup_steps), strict=True)
        wanted = [level for level, probability in trained if probability > 0]
        if self.config.weight("consistency"):
            wanted += grid_sigmas(self.student.process, self.config.consistency_levels)[:-1].tolist()
        return [s for s in batch.state_sigmas if any(abs(s - level) <= 1e-4 * s for level in wanted)]

    def probabilities(self, step: int) -> tuple[float, ...]:
        """How often each level is drawn at a step."""
        config = self.config
        chosen = config.warmup_probabilities if step < config.warmup_steps else config.probabilities
        return chosen or config.probabilities or (1.0,) * len(self.levels)

    def generator_loss(self, step: StudentStep) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the terms; gradients are wanted for the student only."""
        total, logs = step.fake.new_zeros(()), {}
        for name, weight in self.config.terms.items():
            if weight:
                value = getattr(self, f"_{name}")(step)
                total = total + weight * value
                logs[name] = value.item()
        return total, logs | diversity(step.fake, step.batch.latents)

    def _pairs(self, step: StudentStep) -> Tensor:
        """Only items that lie on a stored path count; the rest of the batch weighs nothing."""
        return (self.distance(step.fake, step.batch.latents, step.random) * step.on_path).mean()

    def _consistency(self, step: StudentStep) -> Tensor:
        """Only items on the consistency grid count: one guided Euler step down, then the student's own answer there."""
        return (self.distance(step.fake, step.consistency_target, step.random) * step.on_grid).mean()


class StudentStep:
    """The shared tensors of one step: what several losses need is computed once, when it is first asked for.

    At the process' highest level the student sees pure noise, whatever the model's schedule leaves of the image there
    (zero terminal SNR, ADD section 3.1): that is where sampling starts.
    """

    redrawn: ClassVar[tuple[str, ...]] = ()

    def __init__(self, method: StudentMethod, batch: Batch, random: ItemNoise, step: int) -> None:
        self.method, self.batch, self.random, self.number = method, batch, random, step
        config, process = method.config, method.student.process
        sigma = draw_from_grid(random, torch.tensor(method.levels), method.probabilities(step))
        self.on_grid = torch.zeros(len(sigma), dtype=torch.bool)
        if config.weight("consistency"):
            grid = grid_sigmas(process, config.consistency_levels)[:-1]
            self.on_grid = random.uniform() < config.consistency_share
            sigma = torch.where(self.on_grid, draw_from_grid(random, grid, [1.0] * len(grid)), sigma)
        self.noise = random.normal_like(batch.latents)
        self.sigma = sigma.to(batch.latents.device)
        self.x = process.noise_scaling(self.sigma, self.noise, batch.latents)
        self.at_top = self.sigma >= process.sigma_max * (1 - 1e-4)
        pure = process.noise_scaling(self.sigma, self.noise, torch.zeros_like(self.noise), max_denoise=True)
        self.x = torch.where(self.at_top.view(-1, 1, 1, 1), pure, self.x)
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
        process, top = self.method.student.process, max(self.method.levels)
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
        """Forget what the discriminator's update drew, for another update on fresh noise."""
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
