"""Tuning a turbo model on own pictures so that it keeps its few steps and what else it can.

The model is the turbo as it is: with the student's LoRA off it is the *frozen turbo*, which takes the teacher's place.
Its features are what the discriminator reads, its levels are the student's. Items come from two kinds of datasets:

    own    pictures to learn from, without states
    kept   the turbo's own samples of prompts to keep, with the states at its levels (`data.kept`)

and each term counts on the kind that it is meant for (`Tune.active`):

    adversarial     own   LADD's term: results of the tuned turbo against own pictures; on kept items, too, if wanted
    denoising       own   the loss of ordinary training
    reconstruction  own   distance to the own latent, at the lower of the turbo's levels
    distillation    own   distance to what the frozen turbo makes of the result, noised again (`distillation`)
    consistency     own   distance to the tuned turbo's answer one level further down its own list
    keep            kept  distance to the frozen turbo's answer, on states that the turbo itself visits
    agreement       both  distance of its answer at a level to what it makes in the steps that are left
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick, put, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedules import explicit_sigmas, same_level
from ..discriminators.augment import KINDS, Augmentation
from ..settings import help_of, setting
from .base import StudentMethod, Term
from .config import BOTH, OWN, MethodConfig
from .ladd import LADD, LADDConfig, LADDStep

ON_KEPT, ON_BOTH = ("keep",), ("agreement",)


@dataclass(frozen=True)
class TuneConfig(LADDConfig):
    """Everything that defines the tuning of a turbo, beside the loop's settings."""

    terms: dict[str, float] = setting(
        {"denoising": 1.0, "keep": 2.0},
        "Weight of each term of the student's loss. Of own pictures: adversarial, denoising, reconstruction, "
        "distillation, consistency. Of the turbo's own samples: keep. Of both: agreement. A term that is left out, or "
        "weighs 0, is not computed.",
        low=0,
        high=1e6,
    )
    probabilities: tuple[float, ...] = setting((), help_of(MethodConfig, "probabilities"), low=0, high=1e6)
    warmup_probabilities: tuple[float, ...] = setting(
        (), help_of(MethodConfig, "warmup_probabilities"), low=0, high=1e6
    )
    warmup_steps: int = 0
    denoising_levels: str = setting(
        "student", help_of(MethodConfig, "denoising_levels"), choices=("all", "student"), added=True
    )
    consistency_levels: int = 0
    consistency_from: str = setting(
        "data",
        'Where the consistency term finds the next level: "data", the own latent with the same noise (consistency '
        'training, Song et al. 2023), or "teacher", where a step of the frozen turbo leads.',
        choices=("data", "teacher"),
    )
    reconstruction_below: float = setting(
        0.8,
        "The reconstruction term counts at levels up to this part of the highest, in timesteps: at pure noise nothing "
        "of a picture is left to find again.",
        low=0,
        high=1,
    )
    agreement_sampler: str = setting(
        "euler",
        'Sampler of the steps that are left, for the agreement term: "euler" adds no noise, "renoise" and "ancestral" '
        "do.",
        choices=SAMPLERS,
    )
    adversarial_on: str = setting(
        OWN,
        'Items that the adversarial term judges: "own" pictures, or "both" them and the turbo\'s own samples.',
        choices=(OWN, BOTH),
    )
    augment: tuple[str, ...] = setting(
        (),
        "How the discriminator's view of real and fake latents is changed, for few pictures (DiffAugment): "
        '"translation", "cutout", and "flip" where mirrored pictures are as good.',
        choices=KINDS,
    )

    name: ClassVar[str] = "tune"
    title: ClassVar[str] = "Tune Turbo"
    paper: ClassVar[str] = "the discriminator of LADD (arXiv 2403.12015) on the turbo's own features"
    known_terms = ("adversarial", "denoising", "reconstruction", "distillation", "consistency", "keep", "agreement")
    own_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_tokens:
            raise ValueError(
                "reference_tokens is for a new student; a turbo keeps its levels at every size: set it to 0"
            )

    @property
    def tunes(self) -> bool:
        return True

    @property
    def keeps(self) -> bool:
        """Whether a term needs samples of the turbo itself."""
        return bool(self.weight("keep") or (self.weight("adversarial") and self.adversarial_on == BOTH))

    def method_class(self) -> type[LADD]:
        return Tune


class Tune(LADD):
    """`LADD` whose teacher is the frozen turbo, with terms for own and kept batches."""

    config: TuneConfig

    def active(self, batch: Batch) -> list[str]:
        """The weighted terms that count on a batch: one with states is of kept items."""
        kept = [*ON_KEPT, *ON_BOTH, *(["adversarial"] if self.config.adversarial_on == BOTH else [])]
        known = [name for name, weight in self.config.terms.items() if weight]
        return [name for name in known if (name in kept if batch.states is not None else name not in ON_KEPT)]

    def follows_paths(self, batch: Batch) -> bool:
        return batch.states is not None

    def probabilities(self, step: int, batch: Batch) -> tuple[float, ...]:
        return StudentMethod.probabilities(self, step, batch)

    def check(self, batch: Batch, micro_batch: int) -> None:
        """Refuse what would waste a run. Raises ValueError."""
        super().check(batch, micro_batch)
        if self.config.weight("keep") and not batch.state_sigmas:
            raise ValueError(
                "the keep term needs samples of the turbo itself beside the own pictures: mix a dataset of kept "
                "prompts in, or set the weight of keep to 0"
            )
        if batch.state_sigmas:
            lacking = [s for s in self.levels if not any(same_level(stored, s) for stored in batch.state_sigmas)]
            if lacking:
                spell = lambda levels: ", ".join(f"{level:.4g}" for level in levels)  # noqa: E731
                raise ValueError(
                    f"the kept samples were made at the levels {spell(batch.state_sigmas)}, and the turbo is tuned at "
                    f"{spell(self.levels)}: make them again"
                )
        if not self.active(batch):
            kind = "own pictures" if batch.states is None else "the turbo's own samples"
            raise ValueError(f"no term counts on {kind}, which this run is given: terms are {self.config.terms}")

    def terms(self) -> dict[str, Term]:
        own = {"reconstruction": self.reconstruction_term, "keep": self.keep_term, "agreement": self.agreement_term}
        every = {**super().terms(), **own}
        return {name: every[name] for name in self.config.known_terms}

    def start(self, batch: Batch, random: ItemNoise, step: int) -> TuneStep:
        return TuneStep(self, batch, random, step)

    def reconstruction_term(self, step: TuneStep) -> Tensor:
        """Only items at a low enough level of the turbo count."""
        process = self.student.process
        top = process.timestep(step.sigma.new_full((1,), max(self.levels)))
        low = process.timestep(step.sigma) <= self.config.reconstruction_below * top * (1 + 1e-4)
        random = step.random.named("reconstruction distance")
        return (self.distance(step.fake, step.batch.latents, random) * (low & ~step.denoises)).mean()

    def keep_term(self, step: TuneStep) -> Tensor:
        """Only items on a stored state count."""
        random = step.random.named("keep distance")
        return (self.distance(step.fake, step.frozen_answer, random) * step.on_path).mean()

    def agreement_term(self, step: TuneStep) -> Tensor:
        """Only items at a level of the turbo that is not its last count."""
        target, counts = step.many_steps
        return (self.distance(step.fake, target, step.random.named("agreement distance")) * counts).mean()


class TuneStep(LADDStep):
    """A LADD step with the frozen turbo's answer, and the tuned one's own in all the steps that are left."""

    method: Tune
    redrawn = (*LADDStep.redrawn, "augmentation")

    @cached_property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.method.config.augment, self.random.named("augment"))

    def shown(self, latents: Tensor) -> Tensor:
        return self.augmentation(latents)

    def one_level_down(self, lower: Tensor) -> Tensor:
        if self.method.config.consistency_from == "teacher":
            return super().one_level_down(lower)
        return self.method.student.process.noise_scaling(lower, self.noise, self.batch.latents)

    @cached_property
    @torch.no_grad()
    def frozen_answer(self) -> Tensor:
        return self.method.teacher(self.x, self.sigma, self.batch.cond)

    @cached_property
    @torch.no_grad()
    def many_steps(self) -> tuple[Tensor, Tensor]:
        """What the student makes of its items in the steps that are left [B, C, H, W], and which have any [B]."""
        method, levels, random = self.method, self.method.levels, self.random.named("agreement")
        answer, places, counts = self.fake.detach(), self.places, torch.zeros_like(self.places.denoises)
        noises = [random.normal_like(self.x) for _ in levels[1:]]
        for index, level in enumerate(levels[:-1]):
            here = same_level(places.sigma, level) & ~places.denoises
            rows = here.nonzero().flatten().tolist()
            used = rows or [0] * method.student.together  # other processes may have some, and wait for this one
            if used:
                fresh = iter([pick(noise, used) for noise in noises[index:]])
                made = SAMPLERS[method.config.agreement_sampler](
                    method.student,
                    pick(self.x, used),
                    explicit_sigmas(levels[index:]),
                    {"cond": self.batch.cond[used]},
                    disable=True,
                    noise_sampler=lambda sigma, sigma_next, fresh=fresh: next(fresh),
                )
                if rows:
                    answer, counts = put(answer, rows, made), counts | here
        torch.clear_autocast_cache()  # as after own samples
        return answer, upload(counts, answer.device)
