"""LADD Trainer: a many-step MODEL becomes a few-step LoRA, in the graph."""

from __future__ import annotations

import math

from comfy_api.latest import io, ui

from ..distill_core.losses import GAN_LOSSES
from ..distill_core.methods.ladd import LADDConfig
from ..distill_core.presets import presets
from ..distill_core.runs import RunFolder, StudentConfig
from ..distill_core.samplers import SAMPLERS
from ..distill_core.targets import MOST_STEPS, NO_PRESET, levels_for, preset_levels, probabilities_for, start_for
from ..distill_core.train import PRECISIONS, TrainConfig
from .datasets import Dataset
from .folders import run_folder
from .host_model import facts_of, family_of, training_process_of
from .host_training import Request, train_in_graph
from .results import as_image, report
from .sampling import CATEGORY, OF_PRESET, SEED_MAX

AUTO_ZERO = "0 takes the family's starting value."


def loop_inputs() -> list:
    """What decides how long and how fast it learns."""
    return [
        io.Int.Input("batch_size", default=4, min=1, max=4096, optional=True, tooltip="Items at once; hinge needs 2."),
        io.Int.Input(
            "accumulation", default=1, min=1, max=1024, optional=True, advanced=True,
            tooltip="Micro-batches a step: a larger batch in the memory of a smaller one.",
        ),
        io.Float.Input(
            "student_lr", default=0.0, min=0.0, max=1.0, step=1e-6, round=1e-7, optional=True,
            tooltip=f"Learning rate of the LoRA. {AUTO_ZERO}",
        ),
        io.Float.Input(
            "discriminator_lr", default=0.0, min=0.0, max=1.0, step=1e-6, round=1e-7, optional=True,
            tooltip=f"Learning rate of the heads, mostly 2-10 times the student's. {AUTO_ZERO}",
        ),
        io.Int.Input(
            "discriminator_updates", default=1, min=1, max=20, optional=True, advanced=True,
            tooltip="Discriminator steps a student step.",
        ),
        io.Float.Input(
            "ema_decay", default=0.99, min=0.0, max=0.9999, step=0.001, round=1e-4, optional=True, advanced=True,
            tooltip="Of the averaged student, which is what is saved.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing", default=True, optional=True,
            tooltip="Compute each block twice and hold far less memory. Off is faster where memory is plenty.",
        ),
        io.Combo.Input(
            "precision", options=list(PRECISIONS), default="auto", optional=True, advanced=True,
            tooltip="Of the network's arithmetic; auto is bfloat16 on a GPU that has it.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=SEED_MAX, optional=True, control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Everything random of the run comes from it.",
        ),
        io.Int.Input(
            "checkpoint_every", default=250, min=1, max=100000, optional=True, advanced=True,
            tooltip="Steps between checkpoints. One is also written when you cancel.",
        ),
    ]  # fmt: skip


def method_inputs() -> list:
    """What decides what it learns."""
    return [
        io.Float.Input(
            "pairs_weight", default=4.0, min=0.0, max=1000.0, step=0.1, optional=True,
            tooltip="Weight of the distance to the end of the teacher's path (Diffusion2GAN); has effect if the "
            "dataset keeps pairs at this student's levels. The adversarial term has 1.",
        ),
        io.Combo.Input(
            "loss", options=list(GAN_LOSSES), default="hinge", optional=True, advanced=True,
            tooltip="Adversarial loss. hinge: LADD. nonsaturating also works at batch size 1.",
        ),
        io.Float.Input(
            "renoise_mean", default=0.0, min=-5.0, max=5.0, step=0.1, optional=True, advanced=True,
            tooltip="m of the logit-normal noise level the discriminator looks at: high sees layout, low texture. "
            "Used if renoise_std is above 0.",
        ),
        io.Float.Input(
            "renoise_std", default=0.0, min=0.0, max=5.0, step=0.1, optional=True, advanced=True,
            tooltip="s of that noise level. 0 takes the family's m and s (LADD: 1, 1).",
        ),
        io.Float.Input(
            "r1", default=0.0, min=0.0, max=1000.0, step=0.00001, round=1e-7, optional=True, advanced=True,
            tooltip="Gradient penalty on the heads' inputs (ADD: 0.00001), against an overpowering discriminator.",
        ),
        io.Float.Input(
            "approximate_r1", default=0.0, min=0.0, max=1000.0, step=0.1, round=1e-5, optional=True, advanced=True,
            tooltip="The same without double backward, by a perturbed latent (APT). One more teacher forward a step.",
        ),
        io.Combo.Input(
            "preset", options=[NO_PRESET, *presets()], default=NO_PRESET, optional=True, advanced=True,
            tooltip="Train at the levels of a known turbo model, to be sampled like it; none: evenly spaced ones.",
        ),
        io.Combo.Input(
            "sampler", options=[OF_PRESET, *SAMPLERS], default=OF_PRESET, optional=True, advanced=True,
            tooltip="What the student is meant to be sampled with, written into the file. Without a preset: renoise "
            "(LADD). ancestral keeps more variety in 2-4 steps on the mini model.",
        ),
        io.Int.Input(
            "rank", default=0, min=0, max=1024, optional=True, tooltip=f"Rank of the LoRA. {AUTO_ZERO}"
        ),
        io.String.Input(
            "lora_targets", default="", optional=True, advanced=True,
            tooltip="Only layers whose name contains one of these texts, with commas between, e.g. attn. Empty: all.",
        ),
    ]  # fmt: skip


def preview_inputs() -> list:
    return [
        io.Vae.Input("vae", optional=True, tooltip="For pictures while it trains and for the report."),
        io.Conditioning.Input("preview_positive", optional=True, tooltip="Prompts of these pictures: one or a list."),
        io.Conditioning.Input("preview_negative", optional=True, tooltip="For the guided teacher in the report."),
        io.Int.Input(
            "preview_every", default=50, min=0, max=100000, optional=True, advanced=True,
            tooltip="Steps between sampled pictures on the node (0: only curves). Needs VAE and preview_positive.",
        ),
    ]  # fmt: skip


class LADDTrainer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillLADDTrainer",
            display_name="LADD Trainer",
            category=CATEGORY,
            description="Distils a model into 1-8 steps with latent adversarial diffusion distillation. Cancel at any "
            "time: a checkpoint and a usable LoRA stay, and queueing the same run name goes on.",
            search_aliases=["distill", "turbo lora", "lightning", "train", "few steps", "add"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The teacher, with LoRAs and ModelSampling nodes. It is not changed."),
                Dataset.Input("dataset", tooltip="Of Teacher Latents (best), or of Latents Dataset."),
                io.String.Input(
                    "run_name", default="my_turbo",
                    tooltip="Folder under output/turbo_distill/runs; the LoRA is output/loras/turbo_distill/NAME. The "
                    "same name and settings go on where a run stopped; other settings need another name.",
                ),
                io.Int.Input(
                    "target_steps", default=4, min=1, max=MOST_STEPS, tooltip="Steps the student is to be sampled with."
                ),
                io.Int.Input("steps", default=2000, min=1, max=1000000, tooltip="Training steps; more can be added."),
                *loop_inputs(), *method_inputs(), *preview_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The student: the model with its LoRA."),
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="For Save Turbo LoRA or core's Save LoRA."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For core's Plot Loss Graph."),
                io.Image.Output(display_name="report", tooltip="Curves and, with VAE and preview, before and after."),
                io.String.Output(display_name="run_name", tooltip="For Training Report."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run_name, **inputs) -> float:
        """The report's date; a run that has not ended always runs again, which resumes it."""
        path = RunFolder(run_folder(run_name[0])).report
        return path.stat().st_mtime if path.is_file() else math.nan

    @classmethod
    def execute(cls, preview_positive=(), **inputs) -> io.NodeOutput:
        values = {name: value[0] for name, value in inputs.items()}
        request = request_of(preview_positive=list(preview_positive), **values)
        student, lora, loss_map = train_in_graph(request)
        picture = report(
            request.run_name, request.model, request.vae, request.preview_positive, request.preview_negative
        )
        image = as_image(picture)
        return io.NodeOutput(student, lora, loss_map, image, request.run_name, ui=ui.PreviewImage(image, cls=cls))


def request_of(
    model, dataset, run_name, target_steps, steps, batch_size=4, accumulation=1, student_lr=0.0, discriminator_lr=0.0,
    discriminator_updates=1, ema_decay=0.99, gradient_checkpointing=True, precision="auto", seed=0,
    checkpoint_every=250, pairs_weight=4.0, loss="hinge", renoise_mean=0.0, renoise_std=0.0, r1=0.0,
    approximate_r1=0.0, preset=NO_PRESET, sampler=OF_PRESET, rank=0, lora_targets="", vae=None, preview_positive=(),
    preview_negative=None, preview_every=50,
) -> Request:  # fmt: skip
    """The node's widgets as the core's settings; what is 0 takes the family's starting value."""
    start = start_for(family_of(model))
    if preset == NO_PRESET:
        levels, usual, options = levels_for(training_process_of(model), target_steps), "renoise", {}
    else:
        levels, usual, options = preset_levels(facts_of(model), preset, target_steps)
    own_choice = sampler not in (OF_PRESET, usual)
    probabilities = probabilities_for(len(levels))
    ladd = LADDConfig(
        terms={"adversarial": 1.0, "pairs": pairs_weight}, student_sigmas=levels, probabilities=probabilities,
        warmup_probabilities=probabilities, warmup_steps=0,
        renoise_mean=renoise_mean if renoise_std else start.renoise_mean, renoise_std=renoise_std or start.renoise_std,
        gan_loss=loss, r1=r1, approximate_r1=approximate_r1,
    )  # fmt: skip
    train = TrainConfig(
        steps=steps, batch_size=batch_size, accumulation=accumulation, student_lr=student_lr or start.student_lr,
        discriminator_lr=discriminator_lr or start.discriminator_lr, discriminator_updates=discriminator_updates,
        ema_decay=ema_decay, precision=precision, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    student = StudentConfig(rank or start.rank, (), sampler if own_choice else usual, {} if own_choice else options)
    return Request(
        model, dataset, run_name, ladd, train, student, lora_targets, gradient_checkpointing, vae, preview_positive,
        preview_negative, preview_every,
    )  # fmt: skip


NODES = [LADDTrainer]
