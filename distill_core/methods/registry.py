"""The table of methods, and a method made from its settings and a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.dataset import Batch
from ..models.strengths import StrengthsConfig
from .add import ADDConfig
from .base import StudentMethod
from .components import Components, Ingredients
from .config import MethodConfig
from .diffusion2gan import Diffusion2GANConfig
from .dmd2 import DMD2Config
from .dpo import DPOConfig
from .ladd import LADDConfig
from .tune import TuneConfig

CONFIGS: tuple[type[MethodConfig], ...] = (
    LADDConfig,
    ADDConfig,
    Diffusion2GANConfig,
    DMD2Config,
    TuneConfig,
    DPOConfig,
)
METHODS = {config.name: config for config in CONFIGS}


def new_method(
    config: MethodConfig,
    components: Components,
    example: Batch,
    rank: int,
    *,
    targets: Sequence[str] = (),
    strengths: StrengthsConfig = StrengthsConfig(),
    **ingredients: Any,
) -> StudentMethod:
    """The method that ``config`` is of, with fresh weights from torch's global generator.

    example: a batch whose shapes the discriminator must fit.  rank: of the student's LoRA on the layers ``targets``
    (empty: the backend's own), 0 for full fine-tuning.  strengths: whether the student is told them.
    ingredients: the other fields of `Ingredients`.
    Raises ValueError for components that are missing.
    """
    student = components.trainable_view(rank, targets)
    if strengths.told:
        if config.weight("adversarial") and not config.heads_see_strengths:
            raise ValueError(
                f"[strengths] told: the discriminator of {config.title} does not see the strengths, and the student "
                "would learn to ignore them: take LADD or DMD2, or give adversarial no weight"
            )
        student.strengths = student.backend.new_strengths(strengths)
    return config.build(Ingredients(components, student, components.teacher_view, example, **ingredients))
