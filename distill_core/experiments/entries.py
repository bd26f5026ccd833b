"""The configurations that `compare` trains: the methods, and with them what the claims of the papers need.

An entry's steps are those that took about 70 processor seconds on the machine docs/methods.md names; those of knowledge
distillation, DMD2 and the variants of LADD + pairs took as long as LADD + pairs, 37 to 43 on a later, shared machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

from ..methods.add import ADDConfig
from ..methods.config import MethodConfig
from ..methods.diffusion2gan import Diffusion2GANConfig
from ..methods.dmd2 import DMD2Config
from ..methods.ladd import LADDConfig
from ..training.loop_config import TrainConfig

STUDENT, TEACHER, DATA = "student", "teacher", "data"  # what may be of the ground's smaller model


@dataclass(frozen=True)
class Entry:
    """One configuration: the method's settings, the loop's, and how the student is sampled.

    steps: the step counts it is evaluated at.  eta: of the ancestral sampler.  rank: of the student's LoRA; 0 trains
    all weights.  pretrained: whether the student starts as the teacher; else as a network of random weights, all of
    them trained.  perceptual: whether the shipped E-LatentLPIPS is the distance of the pairs term.  real: the share of
    its batches, 0 to 1, that are of photographs; the others are of teacher latents.
    every_block: whether heads read all of the teacher's blocks, not the method's own choice.
    small: which of `STUDENT`, `TEACHER` (whose features LADD's discriminator reads, and who makes ADD's targets) and
    `DATA` (who made it) are of the ground's smaller model.
    """

    method: MethodConfig
    train: TrainConfig
    steps: tuple[int, ...] = (1, 2, 4)
    eta: float = 1.0
    rank: int = 32
    pretrained: bool = True
    perceptual: bool = False
    real: float = 0.0
    every_block: bool = False
    small: tuple[str, ...] = ()

    def longer(self, factor: float) -> Entry:
        """The same for ``factor`` times as many steps; what begins or ends at a step does so later by that factor."""
        method = {name: round(factor * getattr(self.method, name)) for name in ("warmup_steps", "adversarial_from")}
        train = replace(self.train, steps=max(1, round(factor * self.train.steps)))
        return replace(self, method=replace(self.method, **method), train=train)


def settings(steps: int, batch_size: int = 32, student_lr: float = 6e-4, **more) -> TrainConfig:
    return TrainConfig(steps, batch_size, student_lr=student_lr, **{"discriminator_lr": 4e-3, **more})


def for_add(steps: int) -> TrainConfig:
    """Decoding is what costs, so the heads take four updates on each decoded batch."""
    return settings(steps, 16, 2.5e-4, discriminator_lr=1e-2, discriminator_updates=4)


def ladd(**more) -> Entry:
    return Entry(replace(LADD, **more), settings(175, student_lr=4e-4), eta=0.5, every_block=True)


def ladd_pairs(steps: int, **more) -> Entry:
    """LADD + pairs with other settings."""
    return replace(LADD_PAIRS, method=replace(LADD_PAIRS.method, **more), train=replace(LADD_PAIRS.train, steps=steps))


def paired(steps: int, method: MethodConfig = Diffusion2GANConfig(), **more) -> Entry:
    """One step, from the noises of the teacher's paths."""
    return Entry(method, settings(steps), (1,), **more)


def kd(steps: int, student_lr: float = 6e-4, **more) -> Entry:
    """Knowledge distillation: squared error to the end of the teacher's path from any of its states, no
    discriminator."""
    return Entry(KD, settings(steps, student_lr=student_lr), **more)


def rival_kd(steps: int) -> Entry:
    """`KDModel` of NVlabs/FastGen (commit 34f30e8) by its own settings: half of the squared error, AdamW with betas
    .9 and .999 and weight decay .01, all weights trained. Its highest level is .999, ours is the stored 1."""
    train = settings(steps, student_lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    return Entry(replace(KD, terms={"pairs": 0.5}), train, rank=0)


LADD = LADDConfig(
    probabilities=(0.4, 0.2, 0.2, 0.2), warmup_probabilities=(0.5, 0.5, 0.0, 0.0), warmup_steps=30, renoise_mean=0.0
)
LADD_PAIRS = replace(ladd(terms={"adversarial": 0.25, "pairs": 1.0}), eta=1.0)
ROLLED_OUT = replace(
    ladd(terms={"adversarial": 0.5, "pairs": 1.0}, rollout_share=0.7),
    train=settings(150, student_lr=3e-4),
    eta=0.0,
    rank=0,
)
DMD2 = DMD2Config({"distribution_matching": 1.0, "pairs": 1.0}, fake_score_updates=1, fake_score_lr=1e-3)
KD = LADDConfig({"pairs": 1.0}, probabilities=(1.0,) * 4, warmup_steps=0, regression="mse")
ADD = ADDConfig(probabilities=(0.7, 0.1, 0.1, 0.1), r1=0.05, r1_every=4)
ADVERSARIAL, DISTILLATION = {"adversarial": 1.0}, {"distillation": 2.5}
PAIRS = Diffusion2GANConfig({"pairs": 1.0})
GAN = Diffusion2GANConfig()


def sized(*small: str) -> str:
    """The name of the size study's entry with these of the smaller model."""
    return f"LADD, 1 step, small {' + '.join(small)}" if small else "LADD, 1 step"


SIZED = {  # equal steps and items, so not of one budget: a smaller network is faster
    sized(*small): replace(
        ladd(student_sigmas=(1.0,), probabilities=(), warmup_probabilities=(), warmup_steps=0), steps=(1,), small=small
    )
    for count in range(4)
    for small in combinations((STUDENT, TEACHER, DATA), count)
}
ENTRIES: dict[str, Entry] = {
    "ADD": Entry(ADD, for_add(80)),
    "ADD, three budgets": Entry(ADD, for_add(220)),  # where it goes, since 80 steps are few
    "ADD, adversarial only": Entry(replace(ADD, terms=ADVERSARIAL), for_add(96)),
    "ADD, distillation only": Entry(replace(ADD, terms=DISTILLATION), for_add(160)),
    "ADD, 4 teacher steps": Entry(replace(ADD, teacher_steps=4), for_add(68)),
    "ADD, told nothing": Entry(replace(ADD, text_condition=False, image_condition=False), for_add(80)),
    "ADD, told the text": Entry(replace(ADD, image_condition=False), for_add(80)),
    "ADD, told the image": Entry(replace(ADD, text_condition=False), for_add(80)),
    "ADD, small teacher": Entry(ADD, for_add(80), small=(TEACHER,)),
    "ADD, distillation only, small teacher": Entry(replace(ADD, terms=DISTILLATION), for_add(160), small=(TEACHER,)),
    "LADD": ladd(),
    "LADD + pairs": LADD_PAIRS,
    "LADD + pairs, adversarial late": ladd_pairs(194, adversarial_from=97),
    "LADD + pairs, judged beside photographs": replace(ladd_pairs(250, adversarial_on="own"), real=0.5),
    "LADD + pairs, long average": replace(LADD_PAIRS, train=replace(LADD_PAIRS.train, ema_ramp=2.0)),
    "LADD + pairs, rollouts, four budgets": ROLLED_OUT.longer(4),
    "LADD, m = 1": ladd(renoise_mean=1.0),
    "LADD, m = -1": ladd(renoise_mean=-1.0),
    "LADD, real latents": replace(ladd(), real=1.0),
    "KD": kd(400),
    "KD, all weights": kd(380, student_lr=1e-4, rank=0),
    "rival: KD": rival_kd(380),
    "DMD2": Entry(replace(DMD2, terms=DMD2Config().terms, fake_score_updates=2), settings(100, student_lr=3e-4)),
    "DMD2 + pairs": Entry(DMD2, settings(170)),
    "consistency only": Entry(replace(LADD, terms={"consistency": 1.0}), settings(225), every_block=True),
    "Diffusion2GAN": paired(106),
    "Diffusion2GAN, E-LatentLPIPS": paired(76, perceptual=True),
    "Diffusion2GAN, LADD's discriminator": paired(
        175,
        LADDConfig(
            {"pairs": 1.0, "adversarial": 0.1}, (1.0,), (1.0,), (1.0,), gan_loss="nonsaturating", renoise_mean=0.0
        ),
        every_block=True,
    ),
    "Diffusion2GAN, no noise input": paired(106, replace(GAN, noise_condition=False)),
    "Diffusion2GAN, no R1": paired(110, replace(GAN, r1=0.0)),
    "Diffusion2GAN, no multi-scale": paired(106, replace(GAN, multi_scale=False)),
    "Diffusion2GAN, no mix-and-match": paired(110, replace(GAN, mix_share=0.0)),
    "pairs only": paired(420, PAIRS),
    "pairs only, mse": paired(420, replace(PAIRS, regression="mse")),
    "pairs only, E-LatentLPIPS": paired(138, PAIRS, perceptual=True),
    "pairs only, random start": paired(420, PAIRS, pretrained=False),
    **SIZED,
}
