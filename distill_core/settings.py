"""Settings that explain and check themselves: a config's field carries its words and its range where it is declared.

    @dataclass(frozen=True)
    class TrainConfig(Checked):
        batch_size: int = setting(4, "Items of one micro-batch, over all processes.", low=1, high=4096)

`train --help` and docs/settings.md are made from these words (`training.config`), a node's widget takes the same range.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_origin, get_type_hints

SEED_MAX = 2**64 - 1


class Range(NamedTuple):
    """What a setting may be: a number from ``low`` (or above ``above``) to ``high`` (or below ``below``), or one of
    ``choices``. In a list or table it holds for each entry."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether a value is finite and inside, or one of the choices."""
        if isinstance(value, str):
            return not self.choices or value in self.choices
        return (
            (not isinstance(value, float) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """ "at least 1", "at least 0 and below 1", "one of hinge, nonsaturating"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        limits = [f"{word} {limit:g}" for word, limit in words if limit is not None]
        return " and ".join(limits) or "a finite number"


class Setting(NamedTuple):
    """One field of a config class."""

    name: str
    default: Any
    help: str
    decides: bool
    added: bool
    range: Range = Range()


def setting(
    default: Any, help: str, *, decides: bool = True, added: bool = False, choices: Iterable[str] = (), **limits: float
) -> Any:
    """A dataclass field with its default, its words and what it may be.

    choices, limits (low, high, above, below): the `Range` that `Checked` holds it to; any number must be finite.

    A dict or list is copied for each config; a dataclass, given as the class, is a section of its own.
    decides=False marks a setting that cannot change what a training run becomes, step by step: how long it goes on,
    how often it is saved, or the name of something that is identified by its content elsewhere. Such a setting may
    differ between a checkpoint and the run that goes on from it; all others must agree (`decisive`).
    added=True marks a setting that came after version 0.2, with a default that does what was done before: a
    description names it where it differs from that, so runs and files of before stay what they are. A subclass that had
    it before has its name in ``always_told``.
    """
    metadata: dict[str, Any] = {"help": help, "decides": decides, "added": added}
    if limits or choices:
        metadata["range"] = Range(**limits, choices=tuple(choices))
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(cls: type) -> Iterator[Setting]:
    """The fields of a config class in their order.

    A subclass that only changes a default keeps the words and the range it inherits. A field without a default has
    None.
    """
    for f in fields(cls):
        metadata = _metadata(cls, f.name)
        added = metadata.get("added", False) and f.name not in getattr(cls, "always_told", ())
        flags = metadata.get("decides", True), added
        yield Setting(f.name, default_of(f), metadata.get("help", ""), *flags, metadata.get("range", Range()))


@dataclass(frozen=True)
class Checked:
    """Base of every config class: each setting is looked at when the config is made.

    A subclass that needs more than ranges calls ``super().__post_init__()`` first.
    Raises ValueError that names the setting, the value and its range.
    """

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))  # type: ignore[arg-type]
        for s in settings_of(type(self)):
            value, kind = getattr(self, s.name), get_origin(kinds[s.name]) or kinds[s.name]
            if not isinstance(value, WIDER.get(kind, kind)) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{s.name} must be of type {kind.__name__}, not {type(value).__name__}: {value!r:.80}")
            check_value(s.name, value, s.range)


WIDER: dict[type, Any] = {float: (int, float), tuple: (tuple, list)}  # what serves as one, too


@cache
def _kinds(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def check_value(name: str, value: Any, allowed: Range = Range()) -> None:
    """Raises ValueError for a value out of range, at any depth of lists and tables, and for text that is no Unicode."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_value(f"{name}.{key}", entry, allowed)
    elif isinstance(value, tuple | list):
        for entry in value:
            check_value(name, entry, allowed)
    elif isinstance(value, str) and not is_unicode(value):
        raise ValueError(f"{name} is text that no file can hold: {ascii(value):.80}; type it again")
    elif isinstance(value, int | float | str) and not isinstance(value, bool) and not allowed.holds(value):
        raise ValueError(f"{name} must be {allowed}, not {_spell(value)}")


def _spell(value: float | str) -> str:
    text = repr(value) if isinstance(value, str | float) else str(value) if abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def range_of(cls: type, name: str) -> Range:
    """What one field may be. Raises KeyError where the class has no such field."""
    return {s.name: s.range for s in settings_of(cls)}[name]


def help_of(cls: type, name: str) -> str:
    """The words of one field. Raises KeyError where the class has no such field."""
    return {s.name: s.help for s in settings_of(cls)}[name]


def default_of(f: Field) -> Any:
    """The default value of a dataclass field, None where there is none."""
    if f.default_factory is not MISSING:
        return f.default_factory()
    return None if f.default is MISSING else f.default


def decisive(config: Any) -> dict:
    """Like `dataclasses.asdict`, but only what decides the result of a training run (see `setting`)."""
    told = [s for s in settings_of(type(config)) if s.decides]
    told = [s for s in told if not s.added or getattr(config, s.name) != s.default]
    return {s.name: _decisive_value(getattr(config, s.name)) for s in told}


def _decisive_value(value: Any) -> Any:
    if is_dataclass(value):
        return decisive(value)
    if isinstance(value, dict):
        return {key: _decisive_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_decisive_value, value))
    return copy.deepcopy(value)


def _metadata(cls: type, name: str) -> dict:
    """What `setting` noted; a subclass' notes replace those of its base."""
    noted: dict = {}
    for base in reversed(cls.__mro__):
        found = base.__dict__.get("__dataclass_fields__", {}).get(name)
        noted |= found.metadata if found is not None else {}
    return noted
