"""DMD2 Trainer: teacher and fake score differ, and the student follows (distill_core/methods/dmd2.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.dmd2 import MATCHING, DMD2Config
from ..common import setting_input
from .base import Trainer
from .inputs import loss_input, task_inputs, teacher_cfg_input, teacher_input, weight_input


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        weight_input(
            "pairs_weight",
            1.0,
            "Weight of the distance to the end of the teacher's path (Diffusion2GAN), which DMD had and DMD2 left out. "
            "It has an effect if the dataset keeps pairs at this student's levels. Distribution matching has weight 1.",
        ),
        weight_input(
            "adversarial_weight",
            0.03,
            "Weight of the adversarial term. Distribution matching has weight 1. 0 trains without a discriminator.",
        ),
        setting_input(io.Int, DMD2Config, "fake_score_updates", default=5, max=20),
        setting_input(
            io.Float, DMD2Config, "fake_score_lr", default=0.0, max=1.0, step=1e-6, round=1e-7, advanced=True
        ),
        setting_input(io.Int, DMD2Config, "fake_score_rank", default=0, advanced=True),
        setting_input(io.Float, DMD2Config, "own_share", default=1.0, step=0.05, advanced=True),
        teacher_cfg_input("distribution matching"),
        loss_input("nonsaturating", "DMD2"),
    ]


class DMD2Trainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "DMD2Trainer",
            "DMD2 Trainer",
            "Distils a model into 1-8 steps with improved distribution matching distillation: a second path on the "
            "model learns what the student's results look like, and the student goes from there to the teacher's.",
            aliases=["dmd", "distribution matching", "fake score"],
            task=task_inputs("Made by Teacher Latents, or by Latents Dataset.", 4),
            method=method_inputs(),
            more=[teacher_input()],
        )

    @classmethod
    def method(cls, widgets, levels, start) -> DMD2Config:
        terms = {MATCHING: 1.0, "adversarial": widgets.adversarial_weight, "pairs": widgets.pairs_weight}
        return DMD2Config(
            terms=terms,
            student_sigmas=levels,
            gan_loss=widgets.loss,
            own_share=widgets.own_share,
            fake_score_updates=widgets.fake_score_updates,
            fake_score_lr=widgets.fake_score_lr,
            fake_score_rank=widgets.fake_score_rank,
        )

    @classmethod
    def extra(cls, widgets) -> dict:
        return {"pairs_if_stored": True}


NODES = [DMD2Trainer]
