"""Diffusion2GAN Trainer: in one step from a path's noise to its end (distill_core/methods/diffusion2gan.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.diffusion2gan import Diffusion2GANConfig
from ..common import setting_input
from ..host.parts import Parts
from ..perceptual import Perceptual
from .base import Trainer
from .inputs import loss_input, r1_input, task_inputs, teacher_input, weight_input


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        Perceptual.Input(
            "perceptual",
            optional=True,
            tooltip="The distance to the end of the path, of Load E-LatentLPIPS; its weights must be for this model's "
            "latents. Without it: regression.",
        ),
        setting_input(io.Combo, Diffusion2GANConfig, "regression", default="huber", advanced=True),
        weight_input(
            "adversarial_weight",
            0.1,
            "Weight of the adversarial term, which the paper does not state. The regression has weight 1. 0 trains by "
            "the regression alone.",
        ),
        loss_input("nonsaturating", "Diffusion2GAN"),
        setting_input(io.Combo, Diffusion2GANConfig, "critic", default="lora", advanced=True),
        setting_input(io.Int, Diffusion2GANConfig, "critic_rank", default=32, advanced=True),
        setting_input(
            io.Float,
            Diffusion2GANConfig,
            "mix_share",
            "It makes the discriminator look at noise and text, and needs a batch of 2.",
            default=0.25,
            min=0.0,
            max=0.9,
            step=0.05,
            advanced=True,
        ),
        r1_input(Diffusion2GANConfig, 0.001),
        setting_input(io.Int, Diffusion2GANConfig, "r1_every", default=16, min=1, max=1000, advanced=True),
    ]


class Diffusion2GANTrainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Diffusion2GANTrainer",
            "Diffusion2GAN Trainer",
            "Distils a model into one step that goes where the teacher's own path goes from the same noise, by a "
            "regression on such pairs and a discriminator made from the teacher.",
            aliases=["one step", "pairs", "dmd"],
            task=task_inputs("Made by Teacher Latents with pairs_for_steps = 1 (the target_steps of this node).", 1),
            method=method_inputs(),
            more=[teacher_input()],
        )

    @classmethod
    def method(cls, widgets, levels, start) -> Diffusion2GANConfig:
        return Diffusion2GANConfig(
            terms={"pairs": 1.0, "adversarial": widgets.adversarial_weight},
            student_sigmas=levels,
            gan_loss=widgets.loss,
            regression=widgets.regression,
            mix_share=widgets.mix_share,
            r1=widgets.r1,
            r1_every=widgets.r1_every,
            critic=widgets.critic,
            critic_rank=widgets.critic_rank,
        )

    @classmethod
    def parts(cls, widgets) -> Parts:
        hints = ("set critic to lora",) if widgets.critic == "copy" else ()
        return Parts(widgets.perceptual, hints)


NODES = [Diffusion2GANTrainer]
