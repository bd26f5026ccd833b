"""Settings that explain themselves: a config's field carries its words where it is declared.

    @dataclass(frozen=True)
    class TrainConfig:
        batch_size: int = setting(4, "Items of one micro-batch, over all processes.")

`train --help` and docs/settings.md are made from these words (`training.config`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """One field of a config class."""

    name: str
    default: Any
    help: str
    decides: bool


def setting(default: Any, help: str, *, decides: bool = True) -> Any:
    """A dataclass field with its default and its words.

    A dict or list is copied for each config; a dataclass, given as the class, is a section of its own.
    decides=False marks a setting that cannot change what a training run becomes, step by step: how long it goes on,
    how often it is saved, or the name of something that is identified by its content elsewhere. Such a setting may
    differ between a checkpoint and the run that goes on from it; all others must agree (`decisive`).
    """
    metadata = {"help": help, "decides": decides}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(cls: type) -> Iterator[Setting]:
    """The fields of a config class in their order.

    A subclass that only changes a default keeps the words it inherits. A field without a default has None.
    """
    for f in fields(cls):
        metadata = _metadata(cls, f.name)
        yield Setting(f.name, default_of(f), metadata.get("help", ""), metadata.get("decides", True))


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
    return {s.name: _decisive_value(getattr(config, s.name)) for s in settings_of(type(config)) if s.decides}


def _decisive_value(value: Any) -> Any:
    if is_dataclass(value):
        return decisive(value)
    if isinstance(value, dict):
        return {key: _decisive_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_decisive_value, value))
    return copy.deepcopy(value)


def _metadata(cls: type, name: str) -> dict:
    """What `setting` noted, of the nearest class that has words for this field."""
    for base in cls.__mro__:
        found = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if found is not None and "help" in found.metadata:
            return dict(found.metadata)
    return {}
