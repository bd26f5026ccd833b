"""Tune Turbo: own pictures into a turbo model that keeps its few steps (distill_core/methods/tune.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from comfy_api.latest import io

from ...distill_core.data.kept import KeptConfig
from ...distill_core.data.mix import open_data
from ...distill_core.methods.defaults import StartingValues
from ...distill_core.methods.tune import TuneConfig
from ...distill_core.models.lora import LoraConfig
from ...distill_core.presets.recipe import AUTO, Recipe, make_recipe
from ...distill_core.presets.table import presets
from ...distill_core.training.loop_config import TrainConfig
from ...distill_core.training.student import StudentConfig
from ..common import setting_input
from ..datasets import Dataset
from ..host.folders import lora_files, lora_path
from ..host.kept import TurboSamples, empty_prompt, kept_prompts, picture_size, usual_sizes
from ..host.model import facts_of
from .base import Trainer, lora_targets
from .inputs import loop_inputs, lora_inputs, loss_input, r1_input, run_name_input, steps_input, weight_input

NO_ADAPTER = "none"
ORDINARY = {"betas": (0.9, 0.99)}  # without a discriminator; the core's first moment of 0 is for a game with one
TERMS = {  # of the loss: what it does
    "adversarial": "A discriminator on the frozen turbo's features tells own pictures from the tuned turbo's.",
    "reconstruction": "The tuned turbo finds own pictures again under the noise of its lower levels.",
    "denoising": "Ordinary LoRA training on own pictures; alone, the usual way, which blurs few steps.",
    "consistency": "The tuned turbo answers at each of its levels as it does one level further down.",
    "keep": "On the turbo's own samples of prompts to keep, it answers as the turbo does.",
    "agreement": "Its answer at once is the one that it reaches in the steps that are left.",
}


def turbo_input() -> io.Model.Input:
    return io.Model.Input(
        "model", tooltip="The turbo model as you sample it: a turbo checkpoint, or a model with a turbo LoRA on it."
    )


def turbo_steps_input() -> io.Int.Input:
    return io.Int.Input(
        "turbo_steps",
        default=0,
        min=0,
        max=50,
        optional=True,
        tooltip="Number of sampling steps that you use the turbo with: the noise levels of these are trained. 0 takes "
        "its own number.",
    )


def clip_input(prompts: str) -> io.Clip.Input:
    return io.Clip.Input(
        "clip",
        optional=True,
        tooltip=f"Encodes the 124 prompts that come with the pack. Not needed where {prompts} is connected.",
    )


def count_input(default: int) -> io.Int.Input:
    return io.Int.Input(
        "keep_count",
        default=default,
        min=1,
        max=1 << 20,
        optional=True,
        advanced=True,
        tooltip="How many pictures of the prompts the turbo samples before the training, in its own few steps. They "
        "are made once for a turbo; later runs with as many find them.",
    )


def data_inputs() -> list:
    """What it learns from, and what it is to keep."""
    return [
        turbo_input(),
        Dataset.Input("dataset", tooltip="Your pictures with captions, of Picture Folder or Latents Dataset."),
        run_name_input("my_tuning"),
        steps_input(1000),
        clip_input("keep_positive"),
        io.Conditioning.Input(
            "keep_positive",
            optional=True,
            tooltip="Prompts whose pictures are to stay as they are: a list, of Prompt List and CLIP Text Encode. Not "
            "connected: those that come with the pack, encoded by clip.",
        ),
        turbo_steps_input(),
        io.Float.Input(
            "keep_share",
            default=KeptConfig().share,
            min=0.0,
            max=0.95,
            step=0.01,
            optional=True,
            tooltip="Share of the batches that are prompts to keep. More keeps more of what the turbo was, and learns "
            "your pictures more slowly. 0 keeps nothing.",
        ),
        io.Combo.Input(
            "adapter",
            options=[NO_ADAPTER, *lora_files()],
            default=NO_ADAPTER,
            optional=True,
            tooltip="A training adapter (de-distil LoRA) for this turbo, of De-Distil Adapter or of others. It is on "
            "while the LoRA is trained, in the ordinary way and without prompts to keep, and off in previews, in the "
            "report and when you sample.",
        ),
        setting_input(io.Float, TrainConfig, "keep_at_least", default=0.0, step=0.05, round=1e-3),
        count_input(KeptConfig().count),
    ]


def method_inputs() -> list:
    """What decides what it learns."""
    usual = TuneConfig()
    weights = [
        weight_input(
            f"{name}_weight", usual.weight(name), f"Weight of a term of the loss, 0 for none. {what}", advanced=True
        )
        for name, what in TERMS.items()
    ]
    return [
        *weights,
        setting_input(io.Combo, TuneConfig, "denoising_levels", default=usual.denoising_levels, advanced=True),
        loss_input(usual.gan_loss, "LADD"),
        r1_input(TuneConfig, usual.r1, "It helps against an overpowering discriminator; ADD uses 0.00001."),
    ]


def student_inputs() -> list:
    """Which turbo it is, and the LoRA that is trained on it."""
    return [
        io.Combo.Input(
            "preset",
            options=[AUTO, *presets()],
            default=AUTO,
            optional=True,
            advanced=True,
            tooltip="Which turbo the model is, for its noise levels and its sampler. auto: what its file or turbo LoRA "
            "says of itself, else its family; if a family has several turbos, it asks you to choose.",
        ),
        *lora_inputs(),
    ]


def turbo_recipe(widgets: SimpleNamespace, size: tuple[int, int]) -> Recipe:
    """How the connected turbo is sampled. size: width and height in pixels, on which some turbos' levels depend."""
    facts, (width, height) = facts_of(widgets.model), size
    return make_recipe(facts, widgets.preset, widgets.turbo_steps or None, width=width, height=height)


def tuned_student(
    widgets: SimpleNamespace, start: StartingValues, size: tuple[int, int]
) -> tuple[tuple[float, ...], StudentConfig, str]:
    """The turbo's own levels, a LoRA that is sampled like it, and where both are from."""
    recipe = turbo_recipe(widgets, size)
    sampling = recipe.sampler, recipe.sampler_options
    student = StudentConfig(widgets.rank or start.rank, lora_targets(widgets), *sampling, cfg=recipe.cfg)
    return tuple(recipe.sigmas[:-1].tolist()), student, f"trained as the turbo is sampled: {recipe.explanation}"


class TuneTurbo(Trainer):
    LISTS = ("preview_positive", "keep_positive")
    USUAL = ORDINARY

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "TuneTrainer",
            "Tune Turbo",
            "Trains a LoRA on your pictures for a turbo model, so that it learns them and keeps its few steps and what "
            "it could before.",
            aliases=[
                *("tune", "fine-tune", "finetune", "train style", "style lora", "character lora", "train character"),
                *("turbo lora training", "train on turbo", "training adapter", "own pictures", "dreambooth"),
            ],
            task=data_inputs(),
            method=method_inputs(),
            loop=loop_inputs(discriminator=False),
            student=student_inputs(),
        )

    @classmethod
    def sampling(cls, widgets, start) -> tuple[tuple[float, ...], StudentConfig, str]:
        levels, student, said = tuned_student(widgets, start, picture_size(widgets.model, widgets.dataset))
        if widgets.adapter == NO_ADAPTER:
            return levels, student, said
        over = f"trained over the adapter {widgets.adapter}, which makes it ordinary training without prompts to keep"
        return levels, replace(student, lora=LoraConfig(adapter=lora_path(widgets.adapter))), f"{said}\n{over}"

    @classmethod
    def method(cls, widgets, levels, start) -> TuneConfig:
        if widgets.adapter != NO_ADAPTER:
            return TuneConfig({"denoising": 1.0}, student_sigmas=levels, denoising_levels="all")
        terms = {name: getattr(widgets, f"{name}_weight") for name in TERMS}
        return TuneConfig(
            terms if widgets.keep_share else terms | {"keep": 0.0},
            student_sigmas=levels,
            denoising_levels=widgets.denoising_levels,
            renoise_mean=start.renoise_mean,
            renoise_std=start.renoise_std,
            gan_loss=widgets.loss,
            r1=widgets.r1,
        )

    @classmethod
    def extra(cls, widgets) -> dict:
        wanted = (
            widgets.adapter == NO_ADAPTER and widgets.keep_share and (widgets.keep_weight or widgets.agreement_weight)
        )
        if not wanted:
            return {"tunes": True}
        kept = TurboSamples(
            widgets.model,
            kept_prompts(widgets.keep_positive, widgets.clip),
            turbo_recipe(widgets, picture_size(widgets.model, widgets.dataset)),
            usual_sizes(open_data(widgets.dataset)),
            widgets.keep_count,
            empty=empty_prompt(widgets.clip),
            batch_size=widgets.batch_size,
        )
        return {"tunes": True, "kept": kept, "keep_share": widgets.keep_share}


NODES = [TuneTurbo]
