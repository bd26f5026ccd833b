"""What all methods share: the student's one forward of a step, and the terms of its loss that need no discriminator.

A student's loss is a weighted list of terms over that forward. Every method knows

    pairs         distance to the end of the teacher's own ODE path through this noise (Diffusion2GAN section 3)
    consistency   distance to the student's answer one guided teacher step further down (LCM, arXiv 2310.04378)
    denoising     the loss a diffusion model is trained by, of items at any noise level; alone it is ordinary training

and adds ``adversarial`` with its own discriminator; a combination of methods is a choice of weights.

A new method is a file with a `MethodConfig` (its name, title, settings, and how it is built) and a `StudentMethod` (its
terms and its players), and a line in `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick, put, upload
from ..diffusion.noise import ItemNoise
from ..diffusion.process import euler_step, expand_like
from ..diffusion.schedules import draw_from_grid, draw_whole_schedule, same_level, shift_sigmas
from ..models.denoiser import Cond, Denoiser, Guided
from ..models.guidance import guided
from ..models.items import TEXT_STRENGTH
from . import losses
from .config import OWN, MethodConfig
from .players import Loss, Player, PlayerSettings
from .statistics import diversity

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

    def shift_at(self, size: Sequence[int]) -> float:
        """The factor by which levels are shifted for latents of a size [H, W] (``config.reference_tokens``)."""
        if not self.config.reference_tokens:
            return 1.0
        return self.config.shift(self.student.backend.limits().tokens(*size))

    def levels_of(self, batch: Batch) -> tuple[float, ...]:
        """The student's levels for a batch."""
        return self.levels_at(batch.latents.shape[-2:])

    def consistency_grid(self, batch: Batch) -> Tensor:
        """The levels of the consistency term for a batch, with the closing 0, [K + 1]."""
        grid = self.config.consistency_grid(self.student.process)
        return shift_sigmas(grid, shift_alpha=self.shift_at(batch.latents.shape[-2:]))

    def levels_at(self, size: Sequence[int]) -> tuple[float, ...]:
        """The student's levels for latents of a size [H, W]."""
        return tuple(shift_sigmas(torch.tensor(self.levels).double(), shift_alpha=self.shift_at(size)).tolist())

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
                f"the pairs term needs a level that is both trained and stored: trained {self.levels_of(batch)}, "
                f"stored {batch.state_sigmas}"
            )
        if self.config.rollout_share and self.config.weight("pairs"):
            self.first_state(batch)

    def first_state(self, batch: Batch) -> int:
        """Which of the stored states is at the student's highest level. Raises ValueError for none."""
        top = max(self.levels_of(batch))
        for index, level in enumerate(batch.state_sigmas):
            if same_level(top, level):
                return index
        raise ValueError(
            f"rollout_share begins at the student's highest level, {top:g}, and stored are {batch.state_sigmas}: add "
            "it to [cache] state_sigmas and make the dataset again, or set rollout_share = 0"
        )

    def held_out_figures(self, batch: Batch, random: ItemNoise) -> dict[str, Tensor] | None:
        """What is measured on items that are held out, [B] by name; None for `training.validation`'s own figure."""
        return None

    def _stored_levels(self, batch: Batch) -> list[float]:
        trained = zip(self.levels_of(batch), self.probabilities(self.config.warmup_steps, batch), strict=True)
        wanted = [level for level, probability in trained if probability > 0]
        if self.config.weight("consistency"):
            wanted += self.consistency_grid(batch)[:-1].tolist()
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


@dataclass
class Places:
    """Where the items of a batch are, [B] each, on the CPU, where what to compute is decided without asking a device.

    sigma: noise levels.  on_grid: items of the consistency term.  denoises: items of the denoising term alone.
    at_top: at the process' highest level.  state: which of the stored states an item starts from, -1 for none.
    """

    sigma: Tensor
    on_grid: Tensor
    denoises: Tensor
    at_top: Tensor
    state: Tensor


class StudentStep:
    """The shared tensors of one step: what several losses need is computed once, when it is first asked for.

    At the process' highest level the student sees pure noise, whatever the model's schedule leaves of the image there
    (zero terminal SNR, ADD section 3.1): that is where sampling starts.
    """

    redrawn: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, method: StudentMethod, batch: Batch, random: ItemNoise, step: int) -> None:
        self.method, self.batch, self.random, self.number = method, batch, random, step
        config, process, active = method.config, method.student.process, method.active(batch)
        self.shift, self.levels = method.shift_at(batch.latents.shape[-2:]), method.levels_of(batch)
        # 1. A noise level for each item, [B]: one of the student's own, of the consistency grid, or of the schedule.
        sigma = self.drawn_levels(random.named("level"))
        on_grid = torch.zeros(len(sigma), dtype=torch.bool)
        if "consistency" in active:
            grid = method.consistency_grid(batch)[:-1]  # [K]
            consistency = random.named("consistency")
            on_grid = consistency.uniform() < config.consistency_share
            sigma = torch.where(on_grid, draw_from_grid(consistency, grid, [1.0] * len(grid)), sigma)
        denoises = torch.zeros(len(sigma), dtype=torch.bool)
        if "denoising" in active:
            denoising = random.named("denoising")
            chosen = denoising.uniform() < config.denoising_share
            denoises = (chosen & ~on_grid) | torch.tensor(active == ["denoising"])
            if config.denoising_levels == "all":
                sigma = torch.where(denoises, self.shifted(draw_whole_schedule(denoising, process)), sigma)
        at_top = sigma >= process.sigma_max * (1 - 1e-4)
        self.places = Places(sigma, on_grid, denoises, at_top, torch.full(sigma.shape, -1))
        if method.follows_paths(batch):
            self._choose_states(random.named("stored state").uniform())
        # The rows that a discriminator judges: all but those that are denoised, which are at no level of the student's.
        self.judged = [row for row, alone in enumerate(denoises.tolist()) if not alone]
        # 2. The same on the device.
        device = batch.latents.device
        self.sigma, self.on_grid, self.denoises = (upload(v, device) for v in (sigma, on_grid, denoises))  # [B]
        self.at_top, state = upload(at_top, device), upload(self.places.state, device)
        self.on_path = state >= 0
        # 3. Where the student starts, x [B, C, H, W]: the latents noised to that level.
        self.noise = random.named("noise").normal_like(batch.latents)  # [B, C, H, W]
        self.x = process.noise_scaling(self.sigma, self.noise, batch.latents)
        # 4. At the highest level sampling starts from noise alone, so the student never sees an image there.
        pure = process.noise_scaling(self.sigma, self.noise, torch.zeros_like(self.noise), max_denoise=True)
        self.x = torch.where(expand_like(self.at_top, pure), pure, self.x)
        # 5. Items that start elsewhere: on a stored path of the teacher, or from what the student makes itself.
        if (self.places.state >= 0).any():
            assert batch.states is not None
            index = state.clamp(min=0).view(-1, *[1] * (batch.states.ndim - 1))  # [B, 1, 1, 1, 1]
            self.x = torch.where(expand_like(self.on_path, self.x), batch.states.take_along_dim(index, 1)[:, 0], self.x)
        if config.rollout_share and method.follows_paths(batch):
            self._roll_out(random.named("rollout").uniform() < config.rollout_share)
        if config.own_share:
            self._start_from_own_samples(random.named("own sample"))
        # 6. The one forward of the student, with its graph.
        lora = method.student.lora
        with lora.dropping(random.named("lora dropout")) if lora else nullcontext():
            self.fake = method.student(self.x, self.sigma, batch.cond)

    def drawn_levels(self, random: ItemNoise) -> Tensor:
        """A noise level of the student's own for each item, [B] on the CPU."""
        method = self.method
        return draw_from_grid(random, torch.tensor(self.levels), method.probabilities(self.number, self.batch))

    def shifted(self, levels: Tensor) -> Tensor:
        """Levels of the process as they are for latents of this size."""
        return shift_sigmas(levels, shift_alpha=self.shift)

    def _choose_states(self, draw: Tensor) -> None:
        """Where the student's level is one of the stored ones, start from the teacher's state there."""
        assert self.batch.states is not None
        use = (draw < self.method.config.state_share) & ~self.places.denoises
        for index, level in enumerate(self.batch.state_sigmas):
            self.places.state[use & same_level(self.places.sigma, level)] = index

    @torch.no_grad()
    def _roll_out(self, chosen: Tensor) -> None:
        """Chosen items [B] below the highest level start where the student's Euler steps from the path's noise lead."""
        levels, places, student = sorted(self.levels, reverse=True), self.places, self.method.student
        chosen = chosen & (places.state >= 0) & ~places.on_grid
        assert self.batch.states is not None
        x = self.batch.states[:, self.method.first_state(self.batch)]
        for level, lower in pairwise(levels):
            rows = (chosen & (places.sigma <= lower * (1 + 1e-4))).nonzero().flatten().tolist()
            rows = rows or [0] * student.together  # other processes may have some, and wait for this one
            if rows:
                sigma = self.sigma.new_full((len(rows),), level)
                part = pick(x, rows)
                x = put(x, rows, euler_step(part, student(part, sigma, self.batch.cond[rows]), sigma, lower))
                torch.clear_autocast_cache()  # see `_start_from_own_samples`
        own = upload(chosen & (places.sigma < levels[0]), x.device)
        self.x = torch.where(expand_like(own, x), x, self.x)

    @torch.no_grad()
    def _start_from_own_samples(self, random: ItemNoise) -> None:
        """Below the highest level, start from the student's own one-step sample: what it will meet when it samples."""
        process, top, places = self.method.student.process, max(self.levels), self.places
        chosen, noise = random.uniform() < self.method.config.own_share, random.normal_like(self.batch.latents)
        wanted = chosen & (places.sigma < top) & (places.state < 0) & ~places.on_grid & ~places.denoises
        rows = wanted.nonzero().flatten().tolist()  # R rows of the batch
        if not rows:
            if self.method.student.together:  # other processes may have some, and wait for this one
                self.method.student(self.x[:1], self.sigma[:1], self.batch.cond[:1])
            return
        first, noise = self.sigma.new_full((len(rows),), top), pick(noise, rows)  # [R], [R, C, H, W]
        x = process.noise_scaling(first, noise, torch.zeros_like(noise), max_denoise=True)
        own = self.method.student(x, first, self.batch.cond[rows])
        # Before 2.10 torch would hand these casts of the weights, made without a graph, to the forward with one
        # (pytorch#112583), and the student would learn nothing.
        torch.clear_autocast_cache()
        x = process.noise_scaling(pick(self.sigma, rows), pick(self.noise, rows), own)
        self.x = put(self.x, rows, x)

    @property
    def judged_distinct(self) -> list[int]:
        """Those of `judged` that may enter a statistic."""
        return [row for row in self.batch.distinct if row in self.judged]

    @cached_property
    def guided_teacher(self) -> Guided:
        """The method's, with a guidance for each item where it is drawn."""
        teacher, span = self.method.guided_teacher, self.method.config.guidance_range
        if not span:
            return teacher
        scales = span[0] + (span[1] - span[0]) * self.random.named("guidance").uniform()
        return type(teacher)(teacher.denoiser, teacher.uncond, teacher.scale, upload(scales, self.sigma.device))

    @cached_property
    @torch.no_grad()
    def consistency_target(self) -> Tensor:
        method = self.method
        grid = method.consistency_grid(self.batch)
        # The next level down for each item, [B]: the largest of the grid [K + 1] that is clearly below its own.
        lower = torch.where(grid < self.places.sigma.unsqueeze(1) * (1 - 1e-4), grid, 0.0).amax(1)
        lower = upload(lower, self.sigma.device)
        below = expand_like(lower, self.x)
        x = self.one_level_down(lower)
        # At level 0 the Euler step has already arrived; the network is asked at the lowest level it knows, for nothing.
        answer = method.student(x, lower.clamp(min=grid[-2].item()), self.batch.cond)
        torch.clear_autocast_cache()
        return torch.where(below > 0, answer, x)

    def one_level_down(self, lower: Tensor) -> Tensor:
        """Where the guided teacher's Euler step leads from the items' levels to lower ones [B]."""
        return euler_step(self.x, self.guided_teacher(self.x, self.sigma, self.batch.cond), self.sigma, lower)

    def release(self) -> None:
        """Let go of what an update computed, but for ``kept``, which later updates on this batch use as it is."""
        self.fake = self.fake.detach()
        for name in [name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)]:
            if name not in self.kept:
                del self.__dict__[name]

    def redraw(self) -> None:
        """Forget what the discriminator's update drew, for another update on fresh noise (the streams go on)."""
        for name in self.redrawn:
            self.__dict__.pop(name, None)
        self.fake = self.fake.detach()
