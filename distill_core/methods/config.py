"""What the settings of all methods share, and what a method says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..diffusion.process import DiscreteProcess, NoiseProcess
from ..diffusion.schedules import explicit_sigmas, grid_sigmas, size_shift
from ..settings import Checked, setting
from . import losses

if TYPE_CHECKING:
    from .base import StudentMethod
    from .components import Ingredients

OWN, BOTH = "own", "both"


@dataclass(frozen=True)
class MethodConfig(Checked):
    """Settings of the student's step that all methods share."""

    terms: dict[str, float] = setting(
        {"adversarial": 1.0},
        "Weight of each term of the student's loss: adversarial, distillation, pairs, consistency and denoising. "
        "distillation is the distance to what the teacher makes of the result, noised again (ADD section 3.1). "
        "denoising alone is ordinary training, without a discriminator. "
        "A term that is left out, or weighs 0, is not computed.",
        low=0,
        high=1e6,
    )
    student_sigmas: tuple[float, ...] = setting(
        (),
        "Noise levels the student is trained at, highest first and without the final 0, in the model's own sigmas: up "
        "to 1 for flow models (SD3, FLUX), up to 14.6 for SD 1.5 and SDXL. Empty: evenly spaced steps of the model's "
        "own schedule, four of them (Diffusion2GAN: one).",
        above=0,
        high=1e6,
    )
    probabilities: tuple[float, ...] = setting(
        (),
        "How often each of student_sigmas is drawn, in the same order; they need not sum to 1. Empty: equally often.",
        low=0,
        high=1e6,
    )
    warmup_probabilities: tuple[float, ...] = setting(
        (), "Replaces probabilities during the first warmup_steps. Empty: no difference.", low=0, high=1e6
    )
    warmup_steps: int = setting(0, "Steps during which warmup_probabilities hold.", low=0, high=10**7)
    gan_loss: str = setting(
        "hinge",
        'Adversarial loss: "hinge" (StyleGAN-T; ADD equations 2 and 3), "nonsaturating" (Goodfellow et al. 2014) or '
        '"relativistic" (Jolicoeur-Martineau 2018).',
        choices=losses.GAN_LOSSES,
    )
    regression: str = setting(
        "huber",
        'Distance used by the pairs and consistency terms: "huber" (pseudo-Huber, Song and Dhariwal 2023) or "mse". '
        "A perceptual loss takes its place where one is given.",
        choices=losses.REGRESSIONS,
    )
    state_share: float = setting(
        1.0,
        "With the pairs term: part (0 to 1) of the items at a stored noise level that start from the teacher's own "
        "path there. The others start from a noised latent, and the pairs term ignores them.",
        low=0,
        high=1,
    )
    own_share: float = setting(
        0.0,
        "Part (0 to 1) of the items below the highest level that start from the student's own one-step sample, noised, "
        "instead of a teacher latent (backward simulation; DMD2, arXiv 2405.14867, section 4.5). With the pairs term "
        "only those that state_share leaves.",
        low=0,
        high=1,
    )
    rollout_share: float = setting(
        0.0,
        "With the pairs term: part (0 to 1) of the items at a stored noise level below the highest that start where "
        "the student's own Euler steps from the path's noise lead, instead of the teacher's state there; what they "
        "shall reach stays the teacher's result. For students that are sampled without new noise (sampler euler).",
        low=0,
        high=1,
        added=True,
    )
    consistency_levels: int = setting(
        12,
        "Number of evenly spaced levels on which the consistency term works (LCM, arXiv 2310.04378). 0: those of "
        "student_sigmas.",
        low=0,
        high=1000,
    )
    consistency_share: float = setting(
        0.5,
        "With the consistency term: part (0 to 1) of the items whose level is one of those, not of student_sigmas.",
        low=0,
        high=1,
    )

    denoising_levels: str = setting(
        "all",
        'Noise levels of the denoising term: "all" that the model knows (logit-normal in flow time, for other models '
        'uniform in timesteps with min-SNR weights) or "student", those of student_sigmas.',
        choices=("all", "student"),
        added=True,
    )
    denoising_share: float = setting(
        0.5,
        "With the denoising term: part (0 to 1) of the items that it takes, for which no other term counts. Where it "
        "is the only term it takes all.",
        added=True,
        low=0,
        high=1,
    )

    guidance_range: tuple[float, ...] = setting(
        (),
        "Lowest and highest guidance of the teacher, drawn evenly for each item, in the terms that ask it while the "
        "student is trained: consistency, distillation, distribution_matching. Empty: the dataset's guidance. Stored "
        "pairs keep theirs, and the student is not told it.",
        added=True,
        low=0,
        high=100,
    )
    adversarial_from: int = setting(
        0,
        "Step of the run from which the adversarial term counts for the student; before it the other terms count "
        "alone. The discriminator learns from the first step on, so its verdict is of use when it begins to count.",
        added=True,
        low=0,
        high=10**7,
    )
    adversarial_on: str = setting(
        BOTH,
        'Batches of a mix (section [data]) that the adversarial term judges: "both" kinds, or "own", those of '
        "pictures, which have no pairs. With own the student is judged beside pictures alone, and the pairs are the "
        "teacher's.",
        added=True,
        choices=(OWN, BOTH),
    )
    reference_tokens: int = setting(
        0,
        "Tokens of the latents that all noise levels are meant for. A batch of latents of another size has every level "
        "shifted by a = sqrt(tokens / reference_tokens) (SD3, arXiv 2403.03206, equation 23), which adds ln a to "
        "LADD's renoise_mean. Flow models only; 1024 for SD3 and FLUX at 512 x 512 pixels, 4096 at 1024 x 1024. The "
        "student's file says it, and sampling shifts likewise. 0: the same levels at every size.",
        added=True,
        low=0,
        high=10**7,
    )

    name: ClassVar[str]  # of its section in a TOML file and in files' metadata
    title: ClassVar[str]
    paper: ClassVar[str]
    known_terms: ClassVar[tuple[str, ...]] = ("adversarial", "pairs", "consistency", "denoising")
    default_levels: ClassVar[int] = 4
    sections: ClassVar[tuple[str, ...]] = ("discriminator",)  # shared sections of the TOML file that it reads
    checks_paths: ClassVar[bool] = False  # whether stored pairs are tried by running one path again (`check_pairs`)
    heads_see_strengths: ClassVar[bool] = False  # whether its discriminator is told the strengths of the items
    needs: ClassVar[dict[str, str]] = {}  # per-item tensors that it learns from, and how items are made with them
    own_teacher: ClassVar[bool] = False  # whether the model itself must be the teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.terms) - set(self.known_terms) or not any(self.terms.values()):
            raise ValueError(f"terms must weight some of {', '.join(self.known_terms)}, got {self.terms}")
        if self.adversarial_from and not [name for name in self.terms if self.weight(name) and name != "adversarial"]:
            raise ValueError(
                f"adversarial_from is {self.adversarial_from}, and until then no other term counts: give pairs, "
                "consistency or denoising a weight, or set adversarial_from to 0"
            )
        if self.guidance_range and (len(self.guidance_range) != 2 or self.guidance_range[0] > self.guidance_range[1]):
            raise ValueError(f"guidance_range must be two numbers, the lower first, not {list(self.guidance_range)}")
        given = [len(p) for p in (self.probabilities, self.warmup_probabilities) if p]
        if len({*given, *([len(self.student_sigmas)] if self.student_sigmas else [])}) > 1:
            raise ValueError("student_sigmas, probabilities and warmup_probabilities must have the same length")
        if self.student_sigmas:
            explicit_sigmas(self.student_sigmas)
        for name in ("probabilities", "warmup_probabilities"):
            if getattr(self, name) and not any(getattr(self, name)):
                raise ValueError(f"{name} are all 0: give at least one level a share above 0")

    @property
    def tunes(self) -> bool:
        """Whether it tunes a turbo, the model itself, whose retention is watched then."""
        return False

    @property
    def few_steps(self) -> bool:
        """Whether what is trained is used at noise levels of its own, which its file names; else as the model is."""
        return True

    def build(self, ingredients: Ingredients) -> StudentMethod:
        """The method with fresh weights from torch's global generator. Raises ValueError for what is missing."""
        raise NotImplementedError

    def weight(self, term: str) -> float:
        return self.terms.get(term, 0.0)

    def title_with_terms(self) -> str:
        """The method with the terms that are not its own: "LADD + pairs", "ADD"; "Denoising" where it is no more."""
        own, weighted = {"adversarial", *type(self)().terms}, [term for term, weight in self.terms.items() if weight]
        if weighted == ["denoising"] and own != {"adversarial", "denoising"}:
            return "Denoising"
        return " + ".join([self.title, *(term for term in weighted if term not in own)])

    def shift(self, tokens: int) -> float:
        """The factor by which the levels are shifted for latents of that many tokens; 1 for none."""
        return size_shift(tokens, self.reference_tokens) if self.reference_tokens else 1.0

    def consistency_grid(self, process: NoiseProcess) -> Tensor:
        """The levels of the consistency term, with the closing 0, [K + 1]."""
        if not self.consistency_levels:
            return explicit_sigmas(self.levels(process))
        return grid_sigmas(process, self.consistency_levels)

    def levels(self, process: NoiseProcess) -> tuple[float, ...]:
        """The student's levels for a model's noise process. Raises ValueError for one that the model cannot have."""
        if self.reference_tokens and isinstance(process, DiscreteProcess):
            raise ValueError(
                "reference_tokens shifts the noise levels of flow models (SD3, FLUX), and this model counts timesteps "
                "of a table (SD 1.5, SDXL): set it to 0"
            )
        levels = self.student_sigmas or tuple(grid_sigmas(process, self.default_levels)[:-1].tolist())
        if max(levels) > process.sigma_max * (1 + 1e-4):
            raise ValueError(f"student_sigmas {levels} go beyond this model's highest level, {process.sigma_max:.4g}")
        return levels
