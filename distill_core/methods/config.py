"""What the settings of all methods share, and what a method says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diffusion.process import NoiseProcess
from ..diffusion.schedules import grid_sigmas
from ..settings import setting
from . import losses

if TYPE_CHECKING:
    from .base import StudentMethod
    from .components import Ingredients


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
    sections: ClassVar[tuple[str, ...]] = ("discriminator",)  # shared sections of the TOML file that it reads
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

    def levels(self, process: NoiseProcess) -> tuple[float, ...]:
        """The student's levels for a model's noise process. Raises ValueError for one that the model cannot have."""
        levels = self.student_sigmas or tuple(grid_sigmas(process, self.default_levels)[:-1].tolist())
        if max(levels) > process.sigma_max * (1 + 1e-4):
            raise ValueError(f"student_sigmas {levels} go beyond this model's highest level, {process.sigma_max:.4g}")
        return levels
