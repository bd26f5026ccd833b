"""ADD Trainer: a frozen vision network with trained heads judges decoded images (distill_core/methods/add.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.add import SPACES, ADDConfig
from ..common import setting_input
from ..host.parts import VisionParts
from .base import Trainer
from .inputs import loss_input, r1_input, task_inputs, teacher_cfg_input, teacher_input, weight_input


def vision_inputs() -> list:
    """What the discriminator sees with."""
    return [
        io.Vae.Input(
            "vae",
            tooltip="Decodes the student's latents in every step, with gradients, so a tiny one (taesd, taesdxl, "
            "taesd3 or taef1 in Load VAE) costs far less time and memory. Also used for pictures. Not a video VAE.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="The frozen network under the discriminator's heads, from Load CLIP Vision: DINOv2 (ADD's choice; "
            "ComfyUI opens large and giant only), DINOv3 or CLIP. Without it a tiny VAE's own encoder serves, which "
            "was never trained to recognise anything.",
        ),
        io.Int.Input(
            "vision_size",
            default=0,
            min=0,
            max=2048,
            optional=True,
            advanced=True,
            tooltip="Side in pixels of the images that the vision network sees. 0: 224 (DINO), its own (CLIP), or that "
            "of the images (a tiny VAE's encoder).",
        ),
    ]


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        weight_input(
            "distillation_weight",
            2.5,
            "Weight of the distance to what the teacher makes of the student's image after noising it again (ADD: "
            "2.5). The adversarial term has weight 1.",
        ),
        setting_input(
            io.Combo,
            ADDConfig,
            "weighting",
            "nfsd costs three more teacher forwards a step.",
            default="exponential",
            advanced=True,
        ),
        setting_input(io.Combo, ADDConfig, "space", default=SPACES[0], advanced=True),
        teacher_cfg_input(),
        weight_input(
            "pairs_weight",
            0.0,
            "Weight of the distance to the end of the teacher's path (Diffusion2GAN), which ADD does not have. It "
            "needs a dataset that keeps pairs at this student's levels.",
            advanced=True,
        ),
        loss_input("hinge", "ADD"),
        r1_input(ADDConfig, 1e-5, "It helps against an overpowering discriminator; ADD uses 0.00001."),
    ]


class ADDTrainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "ADDTrainer",
            "ADD Trainer",
            "Distils a model into 1-4 steps with adversarial diffusion distillation, the method of SDXL-Turbo: a "
            "vision network judges the decoded images.",
            aliases=["sdxl turbo", "dino", "real images"],
            task=task_inputs("Made by Latents Dataset (real images, ADD's choice), or by Teacher Latents.", 4),
            method=method_inputs(),
            parts=vision_inputs(),
            preview_vae=False,
            more=[teacher_input()],
        )

    @classmethod
    def method(cls, widgets, levels, start) -> ADDConfig:
        terms = {"adversarial": 1.0, "distillation": widgets.distillation_weight, "pairs": widgets.pairs_weight}
        return ADDConfig(
            terms=terms,
            student_sigmas=levels,
            gan_loss=widgets.loss,
            weighting=widgets.weighting,
            space=widgets.space,
            r1=widgets.r1,
        )

    @classmethod
    def parts(cls, widgets) -> VisionParts:
        return VisionParts(vae=widgets.vae, clip_vision=widgets.clip_vision, size=widgets.vision_size)


NODES = [ADDTrainer]
