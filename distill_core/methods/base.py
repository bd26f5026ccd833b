"""What all methods share: the student's one forward of a step, and the terms of its loss that need no discriminator.

A student's loss is a weighted list of terms over that forward. Every method knows

    pairs         distance to the end of the teacher's own ODE path through this noise (Diffusion2GAN section 3)
    consistency   distance to the student's answer one guided teacher step further down (LCM, arXiv 2310.04378)

and adds ``adversarial`` with its own discriminator; a combination of methods is a choice of weights.

A new method is a file with a `MethodConfig` (its name, title, settings, and how it is built) and a `StudentMethod` (its
terms and its players), and a line in `registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import grid_sigmas
from ..models.denoiser import Denoiser, Guided
from ..settings import setting
from . import losses
from .step import StudentStep, diversity

if TYPE_CHECKING:
    from .components import Ingredients

Distance = Callable[[Tensor, Tensor, ItemNoise], Tensor]
Term = Callable[["StudentStep"], Tensor]  # -> a scalar


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
        "A perceptual loss takes its place where one is given.",
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

    name: ClassVar[str]  # of its section in a TOML file and in files' metadata
    title: ClassVar[str]
    paper: ClassVar[str]
    known_terms: ClassVar[tuple[str, ...]] = ("adversarial", "pairs", "consistency")
    default_levels: ClassVar[int] = 4
    checks_paths: ClassVar[bool] = False  # whether stored pairs are tried by running one path again (`check_pairs`)

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

    def build(self, ingredients: Ingredients) -> StudentMethod:
        """The method with fresh weights from torch's global generator. Raises ValueError for what is missing."""
        raise NotImplementedError

    def weight(self, term: str) -> float:
        return self.terms.get(term, 0.0)

    def title_with_terms(self) -> str:
        """The method with the terms that are not its own: "LADD + pairs", "ADD"."""
        own = {"adversarial", *type(self)().terms}
        return " + ".join([self.title, *(term for term, weight in self.terms.items() if weight and term not in own)])

    def levels(self, process) -> tuple[float, ...]:
        """The student's levels for a model's noise process. Raises ValueError for one that the model cannot have."""
        levels = self.student_sigmas or tuple(grid_sigmas(process, self.default_levels)[:-1].tolist())
        if max(levels) > process.sigma_max * (1 + 1e-4):
            raise ValueError(f"student_sigmas {levels} go beyond this model's highest level, {process.sigma_max:.4g}")
        return levels


class PlayerSettings(Protocol):
    """What the loop's settings (`training.loop.TrainConfig`) say of the players."""

    @property
    def student_lr(self) -> float: ...
    @property
    def discriminator_lr(self) -> float: ...
    @property
    def discriminator_updates(self) -> int: ...


def no_scale(name: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Player:
    """One side of the game that training is: what it minimises, with which parameters, and its optimiser's settings.

    loss: of a step -> (scalar, values to log).  updates: optimiser steps a training step; those after the first see
    fresh noise (`StudentStep.redraw`).  lr_scale: factor on ``lr`` by parameter name.  buffers: state kept beside the
    weights, e.g. of spectral norms; it goes into the checkpoint.  optimizer: settings of AdamW that differ from the
    loop's (betas, eps, weight_decay).
    """

    name: str
    loss: Callable[[StudentStep], tuple[Tensor, dict[str, float]]]
    parameters: dict[str, torch.nn.Parameter]
    lr: float
    updates: int = 1
    lr_scale: Callable[[str], float] = no_scale
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def groups(self) -> list[dict]:
        """Optimiser groups in the order of the parameters, one for each run of equal factors."""
        runs = groupby(self.parameters.items(), key=lambda item: self.lr_scale(item[0]))
        return [{"params": [value for _, value in items], "lr_scale": scale} for scale, items in runs]


class StudentMethod:
    """One training step's losses. The loop calls ``start``, then the loss of each of the `players`.

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

    def players(self, settings: PlayerSettings) -> list[Player]:
        """Who plays, the student first; the discriminator takes part when a term is adversarial."""
        players = [Player("generator", self.generator_loss, self.student.trainable(), settings.student_lr)]
        if self.adversarial:
            assert self.discriminator is not None  # the methods' constructors have seen to it
            discriminator = Player(
                "discriminator",
                self.discriminator_loss,
                dict(self.discriminator.named_parameters()),
                settings.discriminator_lr,
                settings.discriminator_updates,
                self.discriminator_lr_scale,
                dict(self.discriminator.named_buffers()),
            )
            players.append(discriminator)
        return players

    def discriminator_lr_scale(self, name: str) -> float:
        """Learning rate of a discriminator's parameter relative to the loop's ``discriminator_lr``."""
        return 1.0

    def terms(self) -> dict[str, Term]:
        """The terms that a student's loss may weight, by the names in ``config.terms``."""
        return {"pairs": self.pairs_term, "consistency": self.consistency_term}

    def start(self, batch: Batch, random: ItemNoise, step: int) -> StudentStep:
        """Draw noise levels and run the student once."""
        return StudentStep(self, batch, random, step)

    def discriminator_loss(self, step: Any) -> tuple[Tensor, dict[str, float]]:
        """The discriminator's loss and what to log of it."""
        raise NotImplementedError

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
        total, logs, terms = step.fake.new_zeros(()), {}, self.terms()
        for name, weight in self.config.terms.items():
            if weight:
                value = terms[name](step)
                total = total + weight * value
                logs[name] = value.item()
        return total, logs | diversity(step.fake, step.batch.latents)

    def pairs_term(self, step: StudentStep) -> Tensor:
        """Only items that lie on a stored path count; the rest of the batch weighs nothing."""
        random = step.random.named("pairs distance")
        return (self.distance(step.fake, step.batch.latents, random) * step.on_path).mean()

    def consistency_term(self, step: StudentStep) -> Tensor:
        """Only items on the consistency grid count: one guided Euler step down, then the student's own answer there."""
        random = step.random.named("consistency distance")
        return (self.distance(step.fake, step.consistency_target, random) * step.on_grid).mean()
