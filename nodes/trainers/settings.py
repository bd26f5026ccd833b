"""Training Settings: what a trainer can be told beyond its own widgets, for people who know what they want.

A new setting of the core is one line: its widget, in a list of `SETTINGS`. Trainers take the values by `with_settings`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, get_args, get_type_hints

from comfy_api.latest import io

from ...distill_core.methods.config import MethodConfig
from ...distill_core.models.lora import LoraConfig
from ...distill_core.settings import settings_of
from ...distill_core.training.loop_config import TrainConfig
from ..common import CATEGORY, setting_input
from ..host.folders import lora_files, lora_path

NO_LORA = "none"
TrainingSettings = io.Custom("TURBO_TRAINING_SETTINGS")
Chosen = dict[type, dict[str, Any]]  # a config class of the core -> its fields and their values
Config = TypeVar("Config")


def train_settings() -> list:
    """Widgets for fields of the core's TrainConfig."""
    return [
        setting_input(io.Combo, TrainConfig, "optimizer", default="adamw"),
        setting_input(io.Combo, TrainConfig, "discriminator_optimizer", default="adamw"),
        setting_input(io.Combo, TrainConfig, "lr_schedule", default="linear"),
        setting_input(io.Int, TrainConfig, "warmup_steps", default=10, min=0, max=100000),
        setting_input(io.Float, TrainConfig, "decay_from", default=0.7, step=0.05),
        setting_input(
            io.String,
            TrainConfig,
            "betas",
            "Two numbers, separated by a comma. Empty: 0.0, 0.99, and for Tune Turbo, De-Distil Adapter and DPO "
            "Trainer 0.9, 0.99.",
            default="",
            advanced=True,
        ),
        setting_input(
            io.Float, TrainConfig, "weight_decay", default=0.0, min=0.0, max=1.0, step=1e-3, round=1e-5, advanced=True
        ),
        setting_input(io.Float, TrainConfig, "gradient_clip", default=10.0, min=0.0, max=1e6, step=0.1, advanced=True),
        setting_input(io.Float, TrainConfig, "caption_dropout", default=0.0, max=0.9, step=0.05, round=1e-3),
        setting_input(
            io.Int,
            TrainConfig,
            "snapshot_every",
            "That folder is output/loras/turbo_distill/snapshots, where LoRA loaders look, too.",
            default=0,
        ),
        setting_input(io.Int, TrainConfig, "log_every", default=50, advanced=True),
        setting_input(io.Boolean, TrainConfig, "preflight", default=True),
        setting_input(io.Boolean, TrainConfig, "stop_when_lost", default=True),
    ]


def lora_settings() -> list:
    """Widgets for fields of the core's LoraConfig."""
    return [
        setting_input(
            io.Combo,
            LoraConfig,
            "start_from",
            "none: a new one. Leave the trainer's rank at 0 to take the file's.",
            options=[NO_LORA, *lora_files()],
            default=NO_LORA,
        ),
        setting_input(io.Float, LoraConfig, "alpha", default=0.0, step=1.0, advanced=True),
        setting_input(io.Float, LoraConfig, "dropout", default=0.0, max=0.9, step=0.05, round=1e-3, advanced=True),
    ]


def watching() -> list:
    """Widgets for fields of the core's TrainConfig about looking at a run."""
    return [
        setting_input(io.Float, TrainConfig, "validation", default=0.0, step=0.05, round=1e-3),
        setting_input(io.Int, TrainConfig, "validation_every", default=100, advanced=True),
        setting_input(io.String, TrainConfig, "trackers", "Names, separated by commas.", default="", advanced=True),
        setting_input(io.Int, TrainConfig, "retention_every", default=50, advanced=True),
        setting_input(io.Float, TrainConfig, "keep_at_least", default=0.0, step=0.05, round=1e-3),
    ]


def memory() -> list:
    """Widgets for what takes less memory of the device."""
    return [
        setting_input(io.Combo, TrainConfig, "offload", default="none", advanced=True),
        setting_input(io.Boolean, TrainConfig, "offload_activations", default=False, advanced=True),
        setting_input(io.Boolean, TrainConfig, "ema_in_ram", default=False, advanced=True),
    ]


def lora_memory() -> list:
    """Widgets for the LoRA's share of it."""
    return [setting_input(io.Combo, LoraConfig, "lora_dtype", default="float32", advanced=True)]


def speed() -> list:
    """Widgets for what takes less time."""
    return [
        setting_input(io.Boolean, TrainConfig, "channels_last", default=False, advanced=True),
        setting_input(io.Boolean, TrainConfig, "compile", default=False, advanced=True),
    ]


def average() -> list:
    """Widgets for the student's moving average."""
    return [setting_input(io.Float, TrainConfig, "ema_ramp", default=10.0, max=1000.0, step=0.5, advanced=True)]


def of_all_methods() -> list:
    """Widgets for what all methods have in common."""
    return [
        setting_input(io.Int, MethodConfig, "adversarial_from", default=0, max=1000000, advanced=True),
        setting_input(
            io.String, MethodConfig, "guidance_range", "Two numbers, separated by a comma.", default="", advanced=True
        ),
    ]


def tokens() -> list:
    """Widgets for batches of pictures of several sizes."""
    return [setting_input(io.Int, TrainConfig, "tokens_per_batch", default=0, max=10**6, advanced=True)]


def reference() -> list:
    """Widgets for levels at several sizes."""
    return [setting_input(io.Int, MethodConfig, "reference_tokens", default=0, max=10**6, advanced=True)]


# A config and its widgets, each called as a field; new ones at the end, for the sake of saved workflows.
SETTINGS = [
    (TrainConfig, train_settings),
    (LoraConfig, lora_settings),
    (TrainConfig, watching),
    (TrainConfig, memory),
    (LoraConfig, lora_memory),
    (TrainConfig, speed),
    (TrainConfig, average),
    (MethodConfig, of_all_methods),
    (TrainConfig, tokens),
    (MethodConfig, reference),
]


class TrainingSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillTrainingSettings",
            display_name="Training Settings",
            category=CATEGORY,
            description="Settings of a trainer beyond its own widgets: optimizer, schedule and more. Every default "
            "does what a trainer does without this node.",
            search_aliases=["optimizer", "scheduler", "prodigy", "adafactor", "8-bit", "cosine", "trainer options"],
            inputs=[widget for _, widgets in SETTINGS for widget in widgets()],
            outputs=[TrainingSettings.Output(display_name="settings", tooltip="For the input settings of a trainer.")],
        )

    @classmethod
    def execute(cls, **widgets) -> io.NodeOutput:
        chosen: Chosen = {config: {} for config, _ in SETTINGS}
        for config, own in SETTINGS:
            given = {w.id: widgets[w.id] for w in own() if w.id in widgets}
            if given.get("betas") == "":  # the trainer's own
                del given["betas"]
            chosen[config] |= {name: value_of(config, name, value) for name, value in given.items()}
        return io.NodeOutput(chosen)


def value_of(config: type, name: str, given: Any) -> Any:
    """A widget's value as the field has it: a text is split where the field is a tuple. Raises ValueError."""
    if name == "start_from":
        return "" if given == NO_LORA else lora_path(given)
    field = get_type_hints(config)[name]
    if not isinstance(given, str) or field is str:
        return given
    kind = get_args(field)[0]
    try:
        values = tuple(kind(part.strip()) for part in given.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"Training Settings, {name}: {given!r} is not a list of numbers such as 0.0, 0.99") from None
    wanted = {s.name: s.default for s in settings_of(config)}[name]
    if Ellipsis not in get_args(field) and len(values) != len(wanted):
        raise ValueError(f"Training Settings, {name}: {len(wanted)} numbers are wanted, {given!r} has {len(values)}")
    return values


def with_settings(config: Config, chosen: Chosen | None) -> Config:
    """A config of the core with the values that Training Settings has for its class."""
    changes = [values for kind, values in (chosen or {}).items() if isinstance(config, kind)]
    return replace(config, **{name: value for values in changes for name, value in values.items()})  # type: ignore[type-var]


NODES = [TrainingSettingsNode]
