"""A training adapter for a turbo model: a LoRA that takes its few steps out, learnt from its own samples.

A turbo that is trained on at all noise levels forgets its few steps first, and the LoRA that does it has that in it.
An adapter has forgotten them already: with it on while training, what a LoRA learns is the pictures. Off again when
sampling, the few steps are back (ostris' de-distillation adapters, 2025; `lora.LoraConfig.adapter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..settings import help_of, setting
from .base import StudentMethod
from .components import Ingredients
from .config import MethodConfig


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Ordinary training on the turbo's own samples, at all noise levels."""

    terms: dict[str, float] = setting({"denoising": 1.0}, help_of(MethodConfig, "terms"), low=0, high=1e6)

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Training adapter"
    paper: ClassVar[str] = "none"
    sections = ()
    known_terms = ("denoising",)

    def build(self, ingredients: Ingredients) -> StudentMethod:
        return StudentMethod(ingredients.student, ingredients.teacher, self, **ingredients.shared())
