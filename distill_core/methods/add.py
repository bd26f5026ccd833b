"""ADD, adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042): SD-Turbo and SDXL-Turbo.

The student turns a noised image into a clean one in one call, at one of four levels, the highest being pure noise. Its
result is decoded; heads on a frozen vision network judge the pixels (hinge, R1 on the heads' inputs), and the
distillation term (`distillation`) asks for what the teacher makes of that result. The other terms are those of `base`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..devices import pick
from ..diffusion.noise import ItemNoise
from ..discriminators.pixel import PixelDiscriminator, text_embedding
from ..models.denoiser import Cond, Denoiser
from ..models.vision import VisionNetwork, image_embedding
from ..settings import help_of, setting
from . import losses
from .base import Distance, Player, PlayerSettings, Term
from .components import Ingredients, open_vision, with_tiny_decoder
from .config import MethodConfig
from .distillation import DistillationConfig, DistillationStep, Distilling
from .players import Loss
from .statistics import discriminator_health

SPACES = ("pixel", "latent")


@dataclass(frozen=True)
class ADDConfig(DistillationConfig):
    """Everything that defines ADD. The student's levels are by default four evenly spaced ones, drawn equally often."""

    terms: dict[str, float] = setting(
        {"adversarial": 1.0, "distillation": 2.5}, help_of(MethodConfig, "terms") + " ADD weighs distillation by 2.5."
    )
    space: str = setting(
        "pixel",
        'Where the distillation term takes its distance: "pixel" (ADD section 3.1) or "latent", which is cheaper.',
        choices=SPACES,
    )
    r1: float = setting(
        1e-5,
        "Weight of the R1 penalty on the inputs of the discriminator's heads (ADD section 3.2); 0 for none.",
        low=0,
        high=1e6,
    )
    r1_every: int = setting(
        1,
        "Discriminator updates between two R1 penalties, counted over the whole run; each counts as often as it was "
        "left out. 1: every update.",
        low=1,
        high=100000,
    )
    text_condition: bool = setting(True, "Let the discriminator see the text embedding (ADD table 1b).")
    image_condition: bool = setting(
        True,
        "Let the discriminator see an embedding of the real image (ADD table 1b). It is 0 where the student starts "
        "from pure noise and cannot know the image.",
    )

    name: ClassVar[str] = "add"
    title: ClassVar[str] = "ADD"
    paper: ClassVar[str] = "Sauer et al. 2023, arXiv 2311.17042"
    sections = ("vision",)
    always_told = ("weighting", "reduction", "teacher_steps", "time_range", "nfsd_scale")

    def build(self, ingredients: Ingredients) -> ADD:
        components = with_tiny_decoder(ingredients.components, ingredients.vision.decoder)
        vision = discriminator = None
        if self.weight("adversarial"):
            vision = open_vision(ingredients.vision, components)
            if components.decode is None:
                raise ValueError("ADD works on decoded images, and this model has no autoencoder")
            images = components.decode(ingredients.example.latents)
            shown = {"with_text": self.text_condition, "with_image": self.image_condition}
            discriminator = PixelDiscriminator.for_images(vision, images, ingredients.example.cond, **shown)
        student, teacher, decode = ingredients.student, ingredients.teacher, components.decode
        shared = self.shared(ingredients)
        return ADD(student, teacher, discriminator, vision=vision, decode=decode, config=self, **shared)


class ADD(Distilling):
    """`Distilling` with ADD's discriminator, and the distance in pixels if wanted.

    vision: the frozen network under the heads.  decode: latents [B, C, H, W] -> images [B, 3, 8 H, 8 W] in [-1, 1] with
    gradients, e.g. a TAESD decoder.  Both may be None where no term needs them.
    """

    config: ADDConfig
    updates_a_step = 1  # of the discriminator

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        discriminator: PixelDiscriminator | None,
        *,
        vision: VisionNetwork | None,
        decode: Callable[[Tensor], Tensor] | None,
        config: ADDConfig = ADDConfig(),
        uncond: Cond | None = None,
        guidance: float = 1.0,
        distance: Distance | None = None,
        negative: Cond | None = None,
    ) -> None:
        shared: dict[str, Any] = {"uncond": uncond, "guidance": guidance, "distance": distance, "negative": negative}
        super().__init__(student, teacher, config, **shared)
        if self.adversarial and (vision is None or discriminator is None):
            raise ValueError("ADD's adversarial term needs a vision network (`vision`) and heads on it")
        in_pixels = config.weight("distillation") and config.space == "pixel"
        if decode is None and (self.adversarial or in_pixels):
            raise ValueError('ADD works on decoded images and needs a decoder; only space = "latent" does without')
        self.discriminator, self.vision, self.decode = discriminator, vision, decode

    def check(self, batch: Batch, micro_batch: int) -> None:
        """Refuse what would waste a run: also a decoder that cuts the gradient. Raises ValueError."""
        super().check(batch, micro_batch)
        if self.decode is not None:
            images = self.decode(batch.latents[:1].detach().requires_grad_())
            if not images.requires_grad:
                raise ValueError(
                    "the autoencoder gives no gradients (it runs under no_grad or inference mode): the student would "
                    "learn nothing from decoded images; use a decoder that does, such as a tiny autoencoder"
                )

    def players(self, settings: PlayerSettings) -> list[Player]:
        self.updates_a_step = settings.discriminator_updates
        return super().players(settings)

    def start(self, batch: Batch, random: ItemNoise, step: int) -> ADDStep:
        """Draw noise levels and run the student once."""
        return ADDStep(self, batch, random, step)

    def decoded(self, latents: Tensor) -> Tensor:
        """Images [B, 3, h, w] in about [-1, 1], with gradients."""
        assert self.decode is not None  # the constructor has seen to it
        return self.decode(latents)

    def seen(self, images: Tensor) -> list[Tensor]:
        """Tokens of the vision network's taps."""
        assert self.vision is not None  # the constructor has seen to it
        return self.vision(images)

    def _logits(self, tokens: list[Tensor], step: ADDStep) -> Tensor:
        return self.discriminator(tokens, step.text, step.image)

    def terms(self) -> dict[str, Term]:
        return {**super().terms(), "adversarial": self.adversarial_term}

    def adversarial_term(self, step: ADDStep) -> Tensor:
        return self.game(self.gan_generator, step, self._logits(step.fake_tokens, step), step.real_logits)

    def compared(self, step: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """The student's result and its target, decoded with space = "pixel"."""
        if self.config.space == "latent":
            return super().compared(step, target)
        with torch.no_grad():
            target = self.decoded(target)
        return step.fake_images, target

    def discriminator_loss(self, step: ADDStep) -> Loss:
        """GAN loss on detached tokens plus R1 on those of real images (ADD eq. 3); heads only."""
        fake_tokens = [t.detach() for t in step.fake_tokens]
        penalised = self.config.r1 > 0 and step.update_number % self.config.r1_every == 0
        step.updates += 1
        if penalised:
            tokens = [t.detach().requires_grad_() for t in step.real_tokens]
            fake, real = self._logits(fake_tokens, step), self._logits(tokens, step)
        else:
            both = [torch.cat(pair) for pair in zip(fake_tokens, step.real_tokens, strict=True)]
            fake, real = self.discriminator(both, step.text.repeat(2, 1), step.image.repeat(2, 1)).chunk(2)
        loss = self.game(self.gan_discriminator, step, fake, real)
        rows = step.judged_distinct
        logs = {"discriminator": loss.detach(), **discriminator_health(pick(fake, rows), pick(real, rows))}
        if penalised:
            penalty = losses.r1_on_head_inputs(real, tokens)
            loss, logs["r1"] = loss + self.config.r1 * self.config.r1_every * penalty, penalty.detach()
        return loss, logs


class ADDStep(DistillationStep):
    """A distilled step with its decoded images and their tokens."""

    method: ADD
    updates = 0  # of the discriminator on this batch
    kept = ("fake_tokens", "real_tokens", "text", "image")  # what decoding and the vision network cost is paid once

    @property
    def update_number(self) -> int:
        """Which of the run's discriminator updates is next."""
        return self.number * self.method.updates_a_step + self.updates

    def release(self) -> None:
        """Also cut the tokens from the graph that made them."""
        super().release()
        if "fake_tokens" in self.__dict__:
            self.fake_tokens = [tokens.detach() for tokens in self.fake_tokens]

    @cached_property
    def fake_images(self) -> Tensor:
        return self.method.decoded(self.fake)

    @cached_property
    def fake_tokens(self) -> list[Tensor]:
        """Tokens of the decoded student output, with the graph alive down to the student."""
        return self.method.seen(self.fake_images)

    @cached_property
    @torch.no_grad()
    def real_tokens(self) -> list[Tensor]:
        return self.method.seen(self.method.decoded(self.batch.latents))

    @cached_property
    def text(self) -> Tensor:
        return text_embedding(self.batch.cond)

    @cached_property
    @torch.no_grad()
    def image(self) -> Tensor:
        """Embedding of the real image; 0 where the student starts from pure noise."""
        if not self.method.config.image_condition:
            return self.fake.new_zeros(len(self.fake), 0)
        return torch.where(self.at_top.unsqueeze(1), 0.0, image_embedding(self.real_tokens))

    @cached_property
    @torch.no_grad()
    def real_logits(self) -> Tensor | None:
        """Only the relativistic generator compares with real examples."""
        if self.method.config.gan_loss != "relativistic":
            return None
        return self.method._logits(self.real_tokens, self)
