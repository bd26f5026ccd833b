from dataclasses import asdict, dataclass, fields, is_dataclass

import pytest

from distill_core.methods.add import ADDConfig
from distill_core.methods.config import MethodConfig
from distill_core.methods.defaults import StartingValues
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import METHODS
from distill_core.models.pipelines import ModelConfig
from distill_core.perceptual.calibration import CalibrationConfig
from distill_core.settings import decisive, help_of, setting, settings_of
from distill_core.training.config import Config
from distill_core.training.loop import TrainConfig
from distill_core.training.run import StudentConfig


def reachable(*classes: type) -> list[type]:
    """The classes and those of their fields' defaults, at any depth."""
    found = []
    for cls in classes:
        inner = [type(s.default) for s in settings_of(cls) if is_dataclass(s.default)]
        found += [cls, *reachable(*inner)]
    return found


EVERY = reachable(Config, *METHODS.values(), StudentConfig, StartingValues, CalibrationConfig)
FIELDS = [
    pytest.param(cls, f.name, id=f"{cls.__name__}.{f.name}")
    for cls in EVERY
    for f in fields(cls)
    if f.name != "methods"
]


def test_the_walk_finds_the_sections():
    assert {TrainConfig, ModelConfig, LADDConfig, ADDConfig, StudentConfig} <= set(EVERY) and len(EVERY) == 26


@pytest.mark.parametrize("cls, name", FIELDS)
def test_every_setting_says_what_it_does(cls, name):
    words = help_of(cls, name)
    assert len(words) >= 15 and words.endswith(".") and "  " not in words


def test_words_and_defaults_come_with_the_field():
    by_name = {s.name: s for s in settings_of(TrainConfig)}
    assert list(by_name) == [f.name for f in fields(TrainConfig)]
    assert {name: s.default for name, s in by_name.items()} == asdict(TrainConfig())
    with pytest.raises(KeyError):
        help_of(TrainConfig, "step")


def test_a_subclass_with_another_default_keeps_the_words():
    assert help_of(LADDConfig, "warmup_steps") == help_of(MethodConfig, "warmup_steps")
    assert LADDConfig().warmup_steps != MethodConfig().warmup_steps


def test_a_dict_is_not_shared_between_configs():
    first, second = LADDConfig(), LADDConfig()
    first.terms["pairs"] = 1.0
    assert second.terms == {"adversarial": 1.0} == LADDConfig().terms


@dataclass(frozen=True)
class Inner:
    rate: float = setting(1.0, "A number that decides.")
    name: str = setting("a", "A name that decides nothing.", decides=False)


@dataclass(frozen=True)
class Outer:
    inner: Inner = setting(Inner, "A section of its own.")
    parts: tuple = setting(((1, 2), Inner()), "A tuple with a section in it.")
    length: int = setting(3, "How long it goes on.", decides=False)


def test_what_decides_nothing_is_left_out_at_any_depth():
    assert decisive(Outer()) == {"inner": {"rate": 1.0}, "parts": ((1, 2), {"rate": 1.0})}
    assert decisive(Outer(length=5, inner=Inner(name="b"))) == decisive(Outer())
    assert decisive(Outer(inner=Inner(rate=2.0))) != decisive(Outer())


def test_a_subclass_with_another_default_decides_as_much():
    @dataclass(frozen=True)
    class Longer(Outer):
        length: int = 7

    assert "length" not in decisive(Longer()) and Longer().length == 7


@pytest.mark.parametrize(
    "cls, loose",
    [
        (
            TrainConfig,
            {"steps", "checkpoint_every", "snapshot_every", "log_every", "validation_every", "trackers"}
            | {"preflight", "stop_when_lost", "sample_every", "retention_every", "keep_at_least"}
            | {"offload", "offload_activations", "ema_in_ram"},
        ),
        (ModelConfig, {"path", "gradient_checkpointing", "perceptual", "loras", "preset", "preset_steps"}),
        (LADDConfig, set()),
    ],
)
def test_which_settings_decide_a_run(cls, loose):
    assert {s.name for s in settings_of(cls) if not s.decides} == loose
    assert asdict(cls()).keys() - decisive(cls()).keys() == loose | {s.name for s in settings_of(cls) if s.added}


def test_a_setting_that_was_added_later_is_told_where_it_differs_from_before():
    """So a run of version 0.2 is the same run today, and one with the new setting is another."""
    assert decisive(TrainConfig()) == decisive(TrainConfig(optimizer="adamw", lr_schedule="linear"))
    assert "optimizer" not in decisive(TrainConfig())
    assert decisive(TrainConfig(optimizer="adafactor"))["optimizer"] == "adafactor"
