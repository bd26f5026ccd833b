"""What all methods share: the terms of a loss over the one forward of a step (`step`) that need no discriminator.

A student's loss is a weighted list of terms over that forward. Every method knows

    pairs         distance to the end of the teacher's own ODE path through this noise (Diffusion2GAN section 3)
    consistency   distance to the student's answer one guided teacher step further down (LCM, arXiv 2310.04378)
    denoising     the loss a diffusion model is trained by, of items at any noise level; alone it is ordinary training

and adds ``adversarial`` with its own discriminator; a combination of methods is a choice of weights.

A new method is a file with a `MethodConfig` (its name, title, settings, and how it is built) and a `StudentMethod` (its
terms and its players), and a line in `registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick
from ..diffusion.noise import ItemNoise
from ..diffusion.schedules import same_level
from ..models.denoiser import Cond, Denoiser
from ..models.guidance import guided
from ..models.items import TEXT_STRENGTH
from . import losses
from .config import OWN, MethodConfig
from .players import Loss, Player, PlayerSettings
from .statistics import diversity
from .step import StudentStep

Distance = Callable[[Tensor, Tensor, ItemNoise], Tensor]
Term = Callable[[Any], Tensor]  # of the method's own kind of step -> a scalar


class StudentMethod:
    """One training step's losses. The loop calls ``start``, then the loss of each of the `players`.

    student, teacher: views of one backbone, or of two.  uncond, guidance: the empty conditioning (one row) and scale of
    the teacher.  distance: ``(prediction, target, random) -> [B]`` of the pairs and consistency terms, e.g. a
    perceptual loss whose transforms are drawn per item from ``random``; None for ``config.regression``.
    """

    discriminator: Any = None  # None where no term is adversarial

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        config: MethodConfig,
        *,
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
    ) -> None:
        if config.weight("consistency") and uncond is None and guidance != 1.0:
            raise ValueError("the consistency term with guidance needs the empty conditioning (uncond)")
        if config.guidance_range and uncond is None:
            raise ValueError("guidance_range needs the empty conditioning (uncond)")
        self.student, self.teacher, self.config = student, teacher, config
        self.levels = config.levels(student.process)
        # Terms that ask it have refused a missing uncond in their constructors.
        self.guided_teacher = guided(teacher, uncond, guidance)  # type: ignore[arg-type]
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
            discriminator = Player(
                "discriminator",
                self.judge,
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
        return {"pairs": self.pairs_term, "consistency": self.consistency_term, "denoising": self.denoising_term}

    def active(self, batch: Batch) -> list[str]:
        """The weighted terms that count on a batch: of a mix, only some items have states for pairs."""
        lacking = {"pairs": batch.states is None}
        lacking["adversarial"] = self.config.adversarial_on == OWN and batch.states is not None
        return [name for name, weight in self.config.terms.items() if weight and not lacking.get(name)]

    def follows_paths(self, batch: Batch) -> bool:
        """Whether items at a level that is stored start from the state there."""
        return "pairs" in self.active(batch)

    def start(self, batch: Batch, random: ItemNoise, step: int) -> StudentStep:
        """Draw noise levels and run the student once."""
        return StudentStep(self, batch, random, step)

    def judge(self, step: Any) -> Loss | None:
        """`discriminator_loss`, None on a batch that it does not judge."""
        return self.discriminator_loss(step) if "adversarial" in self.active(step.batch) else None

    def discriminator_loss(self, step: Any) -> Loss | None:
        """The discriminator's loss and what to log of it."""
        raise NotImplementedError

    def check(self, batch: Batch, micro_batch: int) -> None:
        """Refuse what would waste a run. Raises ValueError."""
        if self.adversarial and self.config.gan_loss == "hinge" and micro_batch < 2:
            raise ValueError(
                "hinge with a batch of 1 saturates on every item and collapses; use batch_size of at least 2 per "
                "process (gradient accumulation does not help) or gan_loss = 'nonsaturating'"
            )
        if self.config.guidance_range and TEXT_STRENGTH in batch.cond.extra:
            raise ValueError(
                "guidance_range draws a guidance for each item, and these items have strengths of their own, which the "
                "teacher takes: leave guidance_range empty"
            )
        if self.config.weight("pairs") and not batch.state_sigmas:
            raise ValueError(
                "the pairs term needs a dataset with stored states, which only the teacher's samples have: set "
                "[cache] state_sigmas (pairs_for_steps in Teacher Latents) and make them again, or set the weight of "
                "the pairs to 0 for pictures"
            )
        if self.config.weight("pairs") and not self._stored_levels(batch):
            raise ValueError(
                f"the pairs term needs a level that is both trained and stored: trained {self.levels}, "
                f"stored {batch.state_sigmas}"
            )

    def held_out_figures(self, batch: Batch, random: ItemNoise) -> dict[str, Tensor] | None:
        """What is measured on items that are held out, [B] by name; None for `training.validation`'s own figure."""
        return None

    def _stored_levels(self, batch: Batch) -> list[float]:
        trained = zip(self.levels, self.probabilities(self.config.warmup_steps, batch), strict=True)
        wanted = [level for level, probability in trained if probability > 0]
        if self.config.weight("consistency"):
            wanted += self.config.consistency_grid(self.student.process)[:-1].tolist()
        return [s for s in batch.state_sigmas if any(same_level(level, s) for level in wanted)]

    def probabilities(self, step: int, batch: Batch) -> tuple[float, ...]:
        """How often each level is drawn for a batch at a step."""
        config = self.config
        chosen = config.warmup_probabilities if step < config.warmup_steps else config.probabilities
        return chosen or config.probabilities or (1.0,) * len(self.levels)

    def generator_loss(self, step: StudentStep) -> Loss | None:
        """Weighted sum of the terms; gradients are wanted for the student only."""
        total, logs, terms = step.fake.new_zeros(()), {}, self.terms()
        active = self.active(step.batch)
        too_early = "adversarial" in active and step.number < self.config.adversarial_from
        if too_early:
            active.remove("adversarial")
        for name in active:
            value = terms[name](step)
            total = total + self.config.weight(name) * value
            logs[name] = value.detach()
        if too_early:
            step.fake = step.fake.detach()  # in its turn the discriminator needs no graph down to the student
        if not logs:
            return None
        rows = step.batch.distinct
        return total, logs | diversity(pick(step.fake, rows), pick(step.batch.latents, rows))

    def pairs_term(self, step: StudentStep) -> Tensor:
        """Only items that lie on a stored path count; the rest of the batch weighs nothing."""
        random = step.random.named("pairs distance")
        return (self.distance(step.fake, step.batch.latents, random) * step.on_path).mean()

    def consistency_term(self, step: StudentStep) -> Tensor:
        """Only items on the consistency grid count: one guided Euler step down, then the student's own answer there."""
        random = step.random.named("consistency distance")
        return (self.distance(step.fake, step.consistency_target, random) * step.on_grid).mean()

    def denoising_term(self, step: StudentStep) -> Tensor:
        """Only items that are denoised count: the error of the latent, weighted as in the model's own training."""
        weight = losses.denoising_weight(self.student.process, step.sigma)
        return (weight * losses.squared_error(step.fake, step.batch.latents) * step.denoises).mean()

    def game(self, loss: Callable[..., Tensor], step: StudentStep, fake: Tensor, real: Tensor | None) -> Tensor:
        """An adversarial loss of logits [B, N]; the items that are denoised weigh nothing."""
        rows = step.judged
        if len(rows) == len(fake):
            return loss(fake, real)
        if not rows:
            return 0.0 * (fake.sum() if real is None else fake.sum() + real.sum())
        return len(rows) / len(fake) * loss(pick(fake, rows), None if real is None else pick(real, rows))
