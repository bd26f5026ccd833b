"""The TOML file of the `cache`, `train`, `sample` and `evaluate` commands."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from ..data.dataset import CacheConfig
from ..methods.add import ADDConfig
from ..methods.base import MethodConfig
from ..methods.components import DiscriminatorConfig, VisionConfig
from ..methods.diffusion2gan import Diffusion2GANConfig
from ..methods.ladd import LADDConfig
from ..methods.registry import METHODS
from ..models.pipelines import ModelConfig
from .loop import TrainConfig


@dataclass(frozen=True)
class PromptConfig:
    """prompts: a text file, one a line (mini model: class names, default all ten).  negative: the empty prompt."""

    prompts: str = ""
    negative: str = ""


@dataclass(frozen=True)
class Config:
    """All sections of the file; a missing one takes its defaults.

    method: "ladd", "add" or "diffusion2gan"; its section is the one that counts.
    """

    method: str = "ladd"
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ladd: LADDConfig = field(default_factory=LADDConfig)
    add: ADDConfig = field(default_factory=ADDConfig)
    diffusion2gan: Diffusion2GANConfig = field(default_factory=Diffusion2GANConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, not {self.method!r}")

    @property
    def method_config(self) -> MethodConfig:
        """The section of the chosen method."""
        return getattr(self, self.method)


SECTIONS = {f.name: f.default_factory for f in fields(Config) if f.name != "method"}


def load_config(path: str | Path) -> Config:
    """Read a TOML file. Raises ValueError for a missing file, broken TOML, an unknown section or key, a wrong type."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    method = _value(str, content.pop("method", Config.method), "method")
    unknown = {name for name, table in content.items() if name not in SECTIONS or not isinstance(table, dict)}
    if unknown:
        raise ValueError(f"{path}: unknown section {sorted(unknown)}; known: {list(SECTIONS)}")
    return Config(method, **{name: _section(cls, content.get(name, {}), name) for name, cls in SECTIONS.items()})


def _section(cls, table: dict, name: str):
    known = {f.name: f for f in fields(cls)}
    unknown = set(table) - set(known)
    if unknown:
        raise ValueError(f"[{name}]: unknown key {sorted(unknown)}; known: {list(known)}")
    kinds = get_type_hints(cls)
    return cls(**{key: _value(kinds[key], value, f"[{name}] {key}") for key, value in table.items()})


def default_of(f):
    """The default value of a dataclass field."""
    return f.default_factory() if f.default is MISSING else f.default


def _value(kind, value, where: str):
    """Tuples for lists, floats for whole numbers where floats are wanted, and nothing else converted."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is tuple and isinstance(value, list):
        inner = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(inner) == len(value):
            return tuple(_value(k, v, where) for k, v in zip(inner, value, strict=True))
    if outer is dict and isinstance(value, dict):
        return {name: _value(inner[1], v, f"{where}.{name}") for name, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        name = kind.__name__ if isinstance(kind, type) and not outer else str(kind)
        raise ValueError(f"{where} must be of type {name}, not {type(value).__name__}: {value!r}")
    return value


def describe_keys() -> str:
    """Every section and key with its default, as a TOML file that could be used as it is."""
    lines = [f"method = {_toml(Config.method)}", ""]
    for section, cls in SECTIONS.items():
        lines.append(f"[{section}]")
        for f in fields(cls):
            lines.append(f"{f.name} = {_toml(default_of(f))}")
        lines.append("")
    return "\n".join(lines)


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
