"""LADD Trainer: the discriminator reads the teacher's own features (distill_core/methods/ladd.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.defaults import probabilities_for
from ...distill_core.methods.ladd import LADDConfig
from ..common import setting_input
from .base import Trainer
from .inputs import loss_input, r1_input, strengths_inputs, task_inputs, teacher_cfg_input, teacher_input, weight_input


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        weight_input(
            "pairs_weight",
            4.0,
            "Weight of the distance to the end of the teacher's path (Diffusion2GAN). It has an effect if the dataset "
            "keeps pairs at this student's levels. The adversarial term has weight 1.",
        ),
        loss_input("hinge", "LADD"),
        setting_input(
            io.Float,
            LADDConfig,
            "renoise_mean",
            "Used if renoise_std is above 0.",
            default=0.0,
            min=-5.0,
            max=5.0,
            step=0.1,
            advanced=True,
        ),
        setting_input(
            io.Float,
            LADDConfig,
            "renoise_std",
            "0 takes mean and deviation of the model's family (LADD: 1, 1).",
            default=0.0,
            min=0.0,
            max=5.0,
            step=0.1,
            advanced=True,
        ),
        r1_input(LADDConfig, 0.0, "It helps against an overpowering discriminator; ADD uses 0.00001."),
        setting_input(
            io.Float,
            LADDConfig,
            "approximate_r1",
            "It costs one more teacher forward a step.",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            round=1e-5,
            advanced=True,
        ),
    ]


def distillation_inputs() -> list:
    """What holds the student to the teacher where the data are real pictures."""
    return [
        weight_input(
            "distillation_weight",
            0.0,
            "Weight of the distance to what the teacher makes of the student's result after noising it again (ADD: "
            "2.5). For real images, of Latents Dataset; it costs a teacher forward a step, two with guidance.",
            advanced=True,
        ),
        teacher_cfg_input(),
    ]


class LADDTrainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "LADDTrainer",
            "LADD Trainer",
            "Distils a model into 1-8 steps with latent adversarial diffusion distillation.",
            aliases=["latent adversarial"],
            task=task_inputs("Made by Teacher Latents (best), or by Latents Dataset.", 4),
            method=method_inputs(),
            more=[*distillation_inputs(), teacher_input(), *strengths_inputs()],
        )

    @classmethod
    def method(cls, widgets, levels, start) -> LADDConfig:
        distilled = {"distillation": widgets.distillation_weight} if widgets.distillation_weight else {}
        return LADDConfig(
            terms={"adversarial": 1.0, "pairs": widgets.pairs_weight, **distilled},
            student_sigmas=levels,
            probabilities=probabilities_for(len(levels)),
            renoise_mean=widgets.renoise_mean if widgets.renoise_std else start.renoise_mean,
            renoise_std=widgets.renoise_std or start.renoise_std,
            gan_loss=widgets.loss,
            r1=widgets.r1,
            approximate_r1=widgets.approximate_r1,
        )

    @classmethod
    def extra(cls, widgets) -> dict:
        return {"pairs_if_stored": True}


NODES = [LADDTrainer]
