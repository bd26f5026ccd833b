"""Diffusion2GAN Trainer: in one step from a path's noise to its end (distill_core/methods/diffusion2gan.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.diffusion2gan import Diffusion2GANConfig
from ...distill_core.methods.losses import REGRESSIONS
from ..perceptual import Perceptual
from .base import Trainer, loss_input, r1_input, task_inputs, weight_input


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        Perceptual.Input(
            "perceptual",
            optional=True,
            tooltip="The distance to the end of the path, of Load E-LatentLPIPS (its weights must be for this model's "
            "latents). Without it: regression.",
        ),
        io.Combo.Input(
            "regression",
            options=list(REGRESSIONS),
            default="huber",
            optional=True,
            advanced=True,
            tooltip="That distance where no perceptual one is connected.",
        ),
        weight_input(
            "adversarial_weight",
            0.1,
            "Weight of the adversarial term (the paper leaves it out); the regression has "
            "1. 0 trains by the regression alone.",
        ),
        loss_input("nonsaturating", "Diffusion2GAN"),
        io.Combo.Input(
            "critic",
            options=["lora", "copy"],
            default="lora",
            optional=True,
            tooltip="What the discriminator trains. lora: low-rank paths on the model, one copy in memory. copy: a "
            "second network, all weights (the paper).",
        ),
        io.Int.Input(
            "critic_rank",
            default=32,
            min=1,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="Rank of the discriminator's paths, if critic is lora.",
        ),
        io.Float.Input(
            "mix_share",
            default=0.25,
            min=0.0,
            max=0.9,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Part of the items that show the discriminator another item's target as a fake (mix-and-match), so "
            "that it looks at noise and text. Needs a batch of 2.",
        ),
        r1_input(0.001, "Gradient penalty on one real item every r1_every steps. 0: none."),
        io.Int.Input(
            "r1_every", default=16, min=1, max=1000, optional=True, advanced=True, tooltip="Steps between penalties."
        ),
    ]


class Diffusion2GANTrainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Diffusion2GANTrainer",
            "Diffusion2GAN Trainer",
            "Distils a model into one step that goes where the teacher's own path goes from the same noise, by a "
            "regression on such pairs and a discriminator made from the teacher.",
            ["one step", "pairs", "dmd"],
            task_inputs("Of Teacher Latents with pairs_for_steps of 1 (target_steps of it).", 1),
            method_inputs(),
        )

    @classmethod
    def method(cls, w, levels, start) -> Diffusion2GANConfig:
        return Diffusion2GANConfig(
            terms={"pairs": 1.0, "adversarial": w.adversarial_weight},
            student_sigmas=levels,
            gan_loss=w.loss,
            regression=w.regression,
            mix_share=w.mix_share,
            r1=w.r1,
            r1_every=w.r1_every,
            critic=w.critic,
            critic_rank=w.critic_rank,
        )

    @classmethod
    def beside(cls, w) -> dict:
        return {"perceptual": w.perceptual}


NODES = [Diffusion2GANTrainer]
