"""ADD Trainer: a frozen vision network with trained heads judges decoded images (distill_core/methods/add.py)."""

from __future__ import annotations

from comfy_api.latest import io

from ...distill_core.methods.add import SPACES, ADDConfig
from ...distill_core.methods.losses import DISTILLATION_WEIGHTS
from .base import Trainer, loss_input, r1_input, task_inputs, weight_input


def vision_inputs() -> list:
    """What the discriminator sees with."""
    return [
        io.Vae.Input(
            "vae",
            tooltip="Decodes what the student makes in every step, so a tiny one (TAESD: taesd, taesdxl, taesd3, taef1 "
            "in Load VAE) costs far less time and memory. Also for pictures. No video VAEs.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="The frozen network under the heads, of Load CLIP Vision: DINOv2 (ADD's choice), DINOv3 or CLIP. "
            "Without it a tiny VAE's own encoder serves, which was never trained to recognise anything.",
        ),
        io.Int.Input(
            "vision_size",
            default=0,
            min=0,
            max=2048,
            optional=True,
            advanced=True,
            tooltip="Side in pixels of the images it is shown. 0: 224 (DINO), its own (CLIP), that of the images (a "
            "tiny VAE's encoder).",
        ),
    ]


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        weight_input(
            "distillation_weight",
            2.5,
            "Weight of the distance to what the teacher makes of the student's image, "
            "noised again (ADD: 2.5). The adversarial term has 1.",
        ),
        io.Combo.Input(
            "weighting",
            options=list(DISTILLATION_WEIGHTS),
            default="exponential",
            optional=True,
            advanced=True,
            tooltip="How that distance counts by noise level: exponential, less the more noise; sds and nfsd are score "
            "distillation (nfsd costs three more teacher forwards a step).",
        ),
        io.Combo.Input(
            "space",
            options=list(SPACES),
            default=SPACES[0],
            optional=True,
            advanced=True,
            tooltip="Where that distance is taken; pixel decodes one more image a step.",
        ),
        io.Float.Input(
            "teacher_cfg",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="The teacher's guidance in that term. 0: the dataset's, that of Teacher Latents or 1 for images.",
        ),
        weight_input(
            "pairs_weight",
            0.0,
            "Weight of the distance to the end of the teacher's path (Diffusion2GAN), not in ADD; "
            "needs a dataset that keeps pairs at this student's levels.",
        ),
        loss_input("hinge", "ADD"),
        r1_input(1e-5, "Gradient penalty on the heads' inputs (ADD: 0.00001), against an overpowering discriminator."),
    ]


class ADDTrainer(Trainer):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "ADDTrainer",
            "ADD Trainer",
            "Distils a model into 1-4 steps with adversarial diffusion distillation, the method of SDXL-Turbo: a "
            "vision network judges the decoded images.",
            ["sdxl turbo", "dino", "real images"],
            task_inputs("Of Latents Dataset (real images, ADD's choice), or of Teacher Latents.", 4),
            method_inputs(),
            vision_inputs(),
            preview_vae=False,
        )

    @classmethod
    def method(cls, w, levels, start) -> ADDConfig:
        return ADDConfig(
            terms={"adversarial": 1.0, "distillation": w.distillation_weight, "pairs": w.pairs_weight},
            student_sigmas=levels,
            gan_loss=w.loss,
            weighting=w.weighting,
            space=w.space,
            r1=w.r1,
        )

    @classmethod
    def beside(cls, w) -> dict:
        return {"clip_vision": w.clip_vision, "vision_size": w.vision_size, "guidance": w.teacher_cfg or None}


NODES = [ADDTrainer]
