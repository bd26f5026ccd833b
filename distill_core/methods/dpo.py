"""Diffusion-DPO: a model learns which of two pictures of a text was preferred (Wallace et al. 2023, arXiv 2311.12908).

Both pictures of a pair get one noise level and one noise. With e the mean squared error of what the network predicts,
S the student, R the reference and w, l the chosen and the rejected picture,

    inside = -beta / 2 [(e(S, w) - e(S, l)) - (e(R, w) - e(R, l))]
    loss   = mean over pairs of -log sigmoid(inside)

(equation 14 there, with its weights constant). The mean over pairs is outside the logarithm. The reference is the
frozen model, which with a LoRA is the student's own network with its path off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.dataset import Batch
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import draw_evenly
from ..models.items import REJECTED
from ..settings import help_of, setting
from . import losses
from .base import StudentMethod, StudentStep, Term
from .components import Ingredients
from .config import MethodConfig
from .players import Loss

PREFERENCE = "preference"
ALL, STUDENT = "all", "student"
LOWEST = 1e-3  # of the parts of a flow model's timesteps that are drawn: timestep 1 of 1000
DRAWS, FAR = 4, 2**40  # of a pair that is held out: how many, and from which item's number on, which no training has


@dataclass(frozen=True)
class DPOConfig(MethodConfig):
    """Everything that defines Diffusion-DPO, beside the loop's settings."""

    terms: dict[str, float] = setting(
        {PREFERENCE: 1.0}, "Weight of the loss, which has one term: preference.", low=0, high=1e6
    )
    student_sigmas: tuple[float, ...] = setting(
        (),
        'With preference_levels = "student": the noise levels, highest first and without the final 0, in the model\'s '
        'own sigmas. Empty: those of the turbo, which are found as for method = "tune" ([model] loras, preset).',
        above=0,
        high=1e6,
    )
    beta: float = setting(
        2000.0,
        "How far the student may go from the reference for what it is shown: higher holds it nearer. The paper and its "
        "code have 5000 for SD 1.5 and SDXL; for flow models there is no such value.",
        above=0,
        high=1e9,
    )
    preference_levels: str = setting(
        ALL,
        'Noise levels of the pairs: "all", evenly over the timesteps of the model, or "student", those of a turbo '
        "model, which keeps its few steps then and is its own reference.",
        choices=(ALL, STUDENT),
    )
    own_share: float = setting(0.0, help_of(MethodConfig, "own_share"), low=0, high=0)

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "Diffusion-DPO"
    paper: ClassVar[str] = "Wallace et al. 2023, arXiv 2311.12908"
    sections = ()
    known_terms = (PREFERENCE,)
    default_levels: ClassVar[int] = 25  # where it is shown how the model samples with it
    needs: ClassVar[dict[str, str]] = {
        REJECTED: "make pairs with `cache`, [preference] samples of the model or --images with [pictures] rejected, in "
        "ComfyUI with rejected_folder of Picture Folder"
    }
    own_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student_sigmas and self.preference_levels == ALL:
            raise ValueError(
                'student_sigmas are for preference_levels = "student"; with "all" the whole schedule is trained: leave '
                "one of them out"
            )

    @property
    def tunes(self) -> bool:
        return self.preference_levels == STUDENT

    @property
    def few_steps(self) -> bool:
        return self.tunes

    def build(self, ingredients: Ingredients) -> DPO:
        return DPO(ingredients.student, ingredients.teacher, self, **ingredients.shared())


class DPO(StudentMethod):
    """`StudentMethod` that learns from pairs; the teacher is the reference, so it is the model that the student was."""

    config: DPOConfig

    def terms(self) -> dict[str, Term]:
        return {PREFERENCE: self.preference_term}

    def check(self, batch: Batch, micro_batch: int) -> None:
        """Refuse items that are no pairs. Raises ValueError."""
        super().check(batch, micro_batch)
        if REJECTED not in batch.beside:
            raise ValueError(f"{self.config.title} learns from pairs of pictures: {self.config.needs[REJECTED]}")

    def start(self, batch: Batch, random: ItemNoise, step: int) -> DPOStep:
        """Draw noise levels and run the student once, on both pictures of each pair."""
        return DPOStep(self, batch, random, step)

    def generator_loss(self, step: DPOStep) -> Loss | None:  # type: ignore[override]  # of its own kind of step
        """The loss, and of the pairs: implicit_accuracy, the share with inside > 0; margin, the mean of inside; chosen
        and rejected, how much less the student errs there than the reference, in units of e."""
        found = super().generator_loss(step)
        assert found is not None  # its term counts on every batch
        gains = (step.errors(step.reference) - step.errors(step.fake)).detach()  # [2, B]
        inside = step.inside.detach()
        figures = {"implicit_accuracy": (inside > 0).float().mean(), "margin": inside.mean()}
        return found[0], found[1] | figures | {"chosen": gains[0].mean(), "rejected": gains[1].mean()}

    def preference_term(self, step: DPOStep) -> Tensor:
        return -F.logsigmoid(step.inside).mean()

    @torch.no_grad()
    def held_out_figures(self, batch: Batch, random: ItemNoise) -> dict[str, Tensor]:
        """The loss of each pair and whether the student has its order right, means over a few draws, [B]."""
        draws = [[FAR + DRAWS * item + draw for item in random.items] for draw in range(DRAWS)]
        insides = torch.stack([self.start(batch, ItemNoise(random.seed, items), 0).inside for items in draws])
        return {"validation": -F.logsigmoid(insides).mean(0), "validation_accuracy": (insides > 0).float().mean(0)}


class DPOStep(StudentStep):
    """A student step on the chosen pictures and, in the second half of the batch, the rejected ones.

    Randomness belongs to an item, and both halves are of the same items: so they have the same levels and noise.
    """

    method: DPO

    def __init__(self, method: DPO, batch: Batch, random: ItemNoise, step: int) -> None:
        count = len(batch.latents)
        both = replace(
            batch,
            latents=torch.cat([batch.latents, batch.beside[REJECTED]]),
            cond=batch.cond[[*range(count), *range(count)]],
            same=(*batch.first, *(count + row for row in batch.first)),
            beside={},
        )
        super().__init__(method, both, ItemNoise(random.seed, [*random.items, *random.items]), step)

    def drawn_levels(self, random: ItemNoise) -> Tensor:
        if self.method.config.preference_levels == STUDENT:
            return super().drawn_levels(random)
        process = self.method.student.process
        return self.shifted(draw_evenly(random, process, 0.0 if process.sigma_min else LOWEST, 1.0))

    @cached_property
    @torch.no_grad()
    def reference(self) -> Tensor:
        """What the reference answers to the student's inputs, [2 B, C, H, W]."""
        return self.method.teacher(self.x, self.sigma, self.batch.cond)

    def errors(self, answer: Tensor) -> Tensor:
        """e of denoised latents [2 B, C, H, W], in float32: of the chosen and of the rejected pictures, [2, B]."""
        weight = losses.prediction_weight(self.method.student.process, self.sigma)
        return (weight * losses.squared_error(answer.float(), self.batch.latents.float())).view(2, -1)

    @cached_property
    def inside(self) -> Tensor:
        """What the sigmoid is taken of, [B]: above 0 where the student has the order right, beside the reference."""
        student, reference = self.errors(self.fake), self.errors(self.reference)
        return -0.5 * self.method.config.beta * ((student[0] - student[1]) - (reference[0] - reference[1]))
