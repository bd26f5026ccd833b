"""LADD Trainer: the discriminator reads the teacher's own features (distill_core/methods/ladd.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.defaults import probabilities_for
from ...distill_core.methods.ladd import LADDConfig
from .base import Trainer, loss_input, r1_input, task_inputs, weight_input


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        weight_input(
            "pairs_weight",
            4.0,
            "Weight of the distance to the end of the teacher's path (Diffusion2GAN); has effect "
            "if the dataset keeps pairs at this student's levels. The adversarial term has 1.",
        ),
        loss_input("hinge", "LADD"),
        io.Float.Input(
            "renoise_mean",
            default=0.0,
            min=-5.0,
            max=5.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="m of the logit-normal noise level the discriminator looks at: high sees layout, low texture. "
            "Used if renoise_std is above 0.",
        ),
        io.Float.Input(
            "renoise_std",
            default=0.0,
            min=0.0,
            max=5.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="s of that noise level. 0 takes the family's m and s (LADD: 1, 1).",
        ),
        r1_input(0.0, "Gradient penalty on the heads' inputs (ADD: 0.00001), against an overpowering discriminator."),
        io.Float.Input(
            "approximate_r1",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            round=1e-5,
            optional=True,
            advanced=True,
            tooltip="The same without double backward, by a perturbed latent (APT). One more teacher forward a step.",
        ),
    ]


class LADDTrainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "LADDTrainer",
            "LADD Trainer",
            "Distils a model into 1-8 steps with latent adversarial diffusion distillation.",
            ["latent adversarial"],
            task_inputs("Of Teacher Latents (best), or of Latents Dataset.", 4),
            method_inputs(),
        )

    @classmethod
    def method(cls, w, levels, start) -> LADDConfig:
        probabilities = probabilities_for(len(levels))
        return LADDConfig(
            terms={"adversarial": 1.0, "pairs": w.pairs_weight},
            student_sigmas=levels,
            probabilities=probabilities,
            warmup_probabilities=probabilities,
            warmup_steps=0,
            renoise_mean=w.renoise_mean if w.renoise_std else start.renoise_mean,
            renoise_std=w.renoise_std or start.renoise_std,
            gan_loss=w.loss,
            r1=w.r1,
            approximate_r1=w.approximate_r1,
        )

    @classmethod
    def beside(cls, w) -> dict:
        return {"pairs_if_stored": True}


NODES = [LADDTrainer]
