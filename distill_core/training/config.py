"""The TOML file of the `cache`, `train`, `sample` and `evaluate` commands."""

from __future__ import annotations

import argparse
import textwrap
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..data.cache import CacheConfig
from ..data.kept import KeptConfig
from ..data.masks import MaskConfig
from ..data.mix import DataConfig
from ..data.pictures import PictureConfig
from ..data.preference import PreferenceConfig
from ..files import read_text
from ..methods.components import DiscriminatorConfig, VisionConfig
from ..methods.config import MethodConfig
from ..methods.registry import METHODS
from ..models.lora import LoraConfig
from ..models.pipelines import ModelConfig, is_guidance_distilled
from ..models.strengths import StrengthsConfig
from ..models.teachers import TeacherConfig
from ..settings import Checked, Setting, setting, settings_of
from .loop_config import TrainConfig
from .run import RunConfig, StudentConfig

WIDTH = 100  # columns of what `train --help` prints


@dataclass(frozen=True)
class PromptConfig(Checked):
    """What the pictures are to show."""

    prompts: str = setting(
        "", "A text file with one prompt a line. The mini model's prompts are its class names; empty: all ten of them."
    )
    negative: str = setting("", "The prompt that classifier-free guidance leads away from, usually empty.")


@dataclass(frozen=True)
class Config(Checked):
    """All sections of the file; a missing one takes its defaults."""

    method: str = setting(
        "ladd",
        f"The method that trains the student: {', '.join(METHODS)}. Only the section of that name counts.",
        choices=METHODS,
    )
    model: ModelConfig = setting(ModelConfig, "The network to distil, and the student on it.")
    lora: LoraConfig = setting(LoraConfig, "The student's LoRA beside its rank and its layers.")
    strengths: StrengthsConfig = setting(
        StrengthsConfig, "Guidance strengths that the student of a model that edits pictures is told."
    )
    teacher: TeacherConfig = setting(TeacherConfig, "Who the student learns from.")
    prompts: PromptConfig = setting(PromptConfig, "What the pictures are to show.")
    cache: CacheConfig = setting(CacheConfig, "How the teacher's latents are made (command `cache`).")
    pictures: PictureConfig = setting(
        PictureConfig, "How own pictures become the data instead (command `cache --images`)."
    )
    masks: MaskConfig = setting(
        MaskConfig, "What of own pictures an inpainting model is to fill (command `cache --images`)."
    )
    preference: PreferenceConfig = setting(PreferenceConfig, 'Pairs of samples for method = "dpo" (command `cache`).')
    kept: KeptConfig = setting(
        KeptConfig, 'Samples of a turbo itself that method = "tune" and the command `adapter` make first.'
    )
    data: DataConfig = setting(DataConfig, "What a student learns from (command `train`).")
    train: TrainConfig = setting(TrainConfig, "The training loop, the same for every method (command `train`).")
    discriminator: DiscriminatorConfig = setting(
        DiscriminatorConfig, "Each discriminator head on feature maps (LADD, Diffusion2GAN, DMD2)."
    )
    vision: VisionConfig = setting(VisionConfig, "What ADD's discriminator looks at images with.")
    methods: dict[str, MethodConfig] = field(default_factory=lambda: {name: cls() for name, cls in METHODS.items()})

    @property
    def method_config(self) -> MethodConfig:
        """The section of the chosen method."""
        return self.methods[self.method]

    def run(self, identities: dict[str, Any]) -> RunConfig:
        """The run that the file describes, of the model and the dataset that ``identities`` names."""
        model = self.model
        student = StudentConfig(
            model.lora_rank, model.lora_targets, model.sampler, lora=self.lora, strengths=self.strengths
        )
        return RunConfig(
            self.method_config,
            self.train,
            student,
            identities,
            self.discriminator,
            self.vision,
            model.taps,
            self.teacher.guidance or None,
        )


SHARED: dict[str, type] = {s.name: type(s.default) for s in settings_of(Config) if s.name not in ("method", "methods")}
SECTIONS: dict[str, type] = {**SHARED, **METHODS}


def load_config(path: str | Path) -> Config:
    """Read a TOML file. Raises ValueError for a missing file, broken TOML, an unknown section or key, a wrong type."""
    text = read_text(path)
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        hint = "; a path is written with / or in single quotes" if "\\" in text else ""
        raise ValueError(f"{path} is not valid TOML: {error}{hint}") from error
    method = _value(str, content.pop("method", Config.method), "method")
    if unknown := sorted(set(content) - set(SECTIONS)):
        what = "section" if isinstance(content[unknown[0]], dict) else "key"
        raise ValueError(f"{path}: unknown {what} {unknown[0]!r}{_meant(unknown[0], ['method', *SECTIONS])}")
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} is a section: write [{name}], and its keys in the lines below")
    sections = {name: _section(cls, content.get(name, {}), name) for name, cls in SECTIONS.items()}
    methods = {name: sections.pop(name) for name in METHODS}
    if "guidance" not in content.get("cache", {}) and is_guidance_distilled(sections["model"].path):
        sections["cache"] = replace(sections["cache"], guidance=1.0)
    return Config(method, **sections, methods=methods)


def _section(cls, table: dict, name: str):
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(table) - set(known)):
        raise ValueError(f"[{name}]: unknown key {unknown[0]!r}{_meant(unknown[0], known)}")
    kinds = get_type_hints(cls)
    values = {key: _value(kinds[key], value, f"[{name}] {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"[{name}] {error}") from None


def _meant(name: str, known: Iterable[str]) -> str:
    """What a name that is not known may have been meant to be: one like it, or that of another section."""
    known = list(known)
    like = get_close_matches(name.lower(), known, n=1)
    homes = [f"[{section}]" for section, cls in SECTIONS.items() if name in {f.name for f in fields(cls)}]
    if name == "method":
        homes = ["the top of the file, above all sections"]
    told = [f"{like[0]!r} is known"] if like else [f"it belongs to {' or '.join(homes)}"] if homes else []
    return "".join(f"; {text}" for text in (*told, f"known: {', '.join(known)}"))


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
        raise ValueError(f"{where} must be of type {_spell_kind(kind)}, not {type(value).__name__}: {value!r}")
    return value


def _spell_kind(kind) -> str:
    """A type in TOML's words: "list of 2 int", "table of float"."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is dict:
        return f"table of {_spell_kind(inner[1])}"
    if outer is tuple:
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"list of {count}{_spell_kind(inner[0])}"
    return kind.__name__


def describe_keys() -> str:
    """Every section and key with its words and its default, as a TOML file that could be used as it is."""
    lines = []
    for section, settings in _sections():
        if section:
            lines += ["", *_comment(section.help), f"[{section.name}]"]
        for s in settings:
            lines += [*_comment(s.help), f"{s.name} = {_toml(s.default)}"]
    return "\n".join(lines) + "\n"


def _sections() -> list[tuple[Setting | None, list[Setting]]]:
    """The keys of each section in the order of the file; first those of none."""
    every = {s.name: s for s in settings_of(Config)}
    heads = [every[name] for name in SHARED]
    heads += [Setting(name, cls(), f"{cls.title}, {cls.paper}.", True, False) for name, cls in METHODS.items()]
    return [(None, [every["method"]]), *((head, list(settings_of(SECTIONS[head.name]))) for head in heads)]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def settings_table() -> str:
    """docs/settings.md: a Markdown table of the keys of each section."""
    lines = [
        "# Settings",
        "",
        "All keys of the TOML file that the commands `cache`, `train`, `sample` and `evaluate` take. What is left out",
        "takes its default. Ready files are in [configs/](../configs).",
        "",
        "This page is the output of `python -m distill_core settings`; the words stand in the code, beside each field.",
    ]
    for section, settings in _sections():
        lines += ["", f"## [{section.name}]" if section else "## At the top of the file", ""]
        lines += [section.help, ""] if section else []
        lines += ["| key | default | what it does |", "|---|---|---|"]
        lines += [f"| `{s.name}` | `{_toml(s.default)}` | {s.help.replace('|', chr(92) + '|')} |" for s in settings]
    return "\n".join(lines) + "\n"


def add_settings_command(commands) -> None:
    """Add ``settings`` to an argparse subparsers object."""
    help = "Print every key of the TOML file with its default and what it does, as Markdown."
    commands.add_parser("settings", help=help, description=help).set_defaults(command=_print_settings)


def _print_settings(args: argparse.Namespace) -> None:
    print(settings_table(), end="")


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
