"""Every setting has a range, which is looked at when a config is made."""

from __future__ import annotations

import math

import pytest

from distill_core.methods.add import ADDConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.settings import Checked, Range, settings_of
from distill_core.training.config import SECTIONS, load_config
from distill_core.training.loop_config import TrainConfig
from distill_core.training.run import StudentConfig
from distill_core.training.run_folder import folder_in

NUMBERS = [
    pytest.param(cls, s, id=f"{cls.__name__}.{s.name}")
    for cls in dict.fromkeys([*SECTIONS.values(), StudentConfig])
    for s in settings_of(cls)
    if isinstance(s.default, float) or (isinstance(s.default, int) and not isinstance(s.default, bool))
]


@pytest.mark.parametrize("cls", dict.fromkeys([*SECTIONS.values(), StudentConfig]))
def test_every_config_is_checked(cls):
    assert issubclass(cls, Checked)


@pytest.mark.parametrize("cls, s", NUMBERS)
def test_no_number_may_be_anything(cls, s):
    """Each has a lowest value, and none takes NaN, infinity or a text."""
    assert s.range.low is not None or s.range.above is not None
    for value in (math.nan, math.inf, -math.inf, "text", None, [1], -(10**30)):
        with pytest.raises(ValueError, match=f"{s.name} must be"):
            cls(**{s.name: value})


@pytest.mark.parametrize(
    "text, message",
    [
        ("[train]\ngradient_clip = -1", r"\[train\] gradient_clip must be at least 0, not -1"),
        ("[train]\ndecay_from = nan", r"\[train\] decay_from must be at least 0 and at most 1, not nan"),
        ("[train]\nbetas = [0.9, 1.0]", r"\[train\] betas must be at least 0 and below 1, not 1.0"),
        ("[ladd]\nterms = { adversarial = -1 }", r"\[ladd\] terms.adversarial must be at least 0"),
        ("[ladd]\nr1 = -inf", r"\[ladd\] r1 must be at least 0"),
        ("[ladd]\nown_share = 1.5", r"\[ladd\] own_share must be at least 0 and at most 1"),
        ("[add]\ntime_range = [0.9, 0.1]", r"\[add\] time_range must go from low to high"),
        ("[cache]\nsizes = [[0, 8]]", r"\[cache\] sizes must be at least 1"),
        ("[discriminator]\nkernel = 4", r"\[discriminator\] kernel must be an odd number"),
        ("[discriminator]\nwidth = -1", r"\[discriminator\] width must be at least 8"),
        ("[discriminator]\nwidth = 12", r"\[discriminator\] width must be a multiple of 8"),
        ("[model]\nlora_rank = 100000", r"\[model\] lora_rank must be at least 0 and at most 1024"),
        (f"[train]\nseed = {2**70}", r"\[train\] seed must be at least 0"),
        (f"[train]\nsteps = {'9' * 5000}", "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
    ],
)
@pytest.mark.case(
    "attack 2", "settings out of range, NaN and the wrong way round are refused with key, value and range"
)
def test_values_out_of_range_are_named(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.toml")


def test_a_range_in_words():
    assert str(Range(low=0, below=1)) == "at least 0 and below 1" and str(Range(above=0)) == "above 0"
    assert str(Range(choices=("a", "b"))) == "one of a, b" and str(Range()) == "a finite number"


def test_a_subclass_with_another_default_keeps_the_range():
    with pytest.raises(ValueError, match="terms.distillation must be at least 0"):
        ADDConfig(terms={"adversarial": 1.0, "distillation": -1.0})
    with pytest.raises(ValueError, match="student_sigmas must be above 0"):
        LADDConfig(student_sigmas=(1.0, 0.75, 0.5, -0.25))


@pytest.mark.case("attack 1", "text that is no Unicode is refused, and spelled out in the message")
def test_text_that_no_file_can_hold():
    with pytest.raises(ValueError, match="targets is text that no file can hold") as refused:
        StudentConfig(targets=("attn", "\ud800"))
    assert str(refused.value).encode()


@pytest.mark.case("attack 15", "names count in bytes, and decomposed letters are letters")
def test_names_of_all_scripts(tmp_path):
    assert folder_in(tmp_path, "e\u0301te\u0301").name == "\u00e9t\u00e9"
    assert folder_in(tmp_path, "名" * 66).name == "名" * 66
    for name in ("名" * 67, "\ud800"):
        with pytest.raises(ValueError, match="cannot be a folder inside") as refused:
            folder_in(tmp_path, name)
        assert str(refused.value).encode()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError):
        folder_in(tmp_path, "circle").mkdir() if folder_in(tmp_path, "circle").exists() else folder_in(
            tmp_path, "circle/x"
        )


def test_clipping_can_be_switched_off():
    assert TrainConfig(gradient_clip=0.0).gradient_clip == 0
