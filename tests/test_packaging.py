"""What a wheel would hold, and what pyproject says of the project."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

from setuptools import find_packages

import distill_core

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_of_the_core_is_a_package_of_the_wheel():
    found = set(find_packages(str(ROOT), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "distill_core").rglob("*.py")
    }
    assert found == folders and "distill_core.models.backends" in found


def test_data_files_are_in_the_wheel():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["distill_core"]
    packed = {path for pattern in patterns for path in (ROOT / "distill_core").glob(pattern)}
    data = {p for p in (ROOT / "distill_core").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data and data == packed


def test_the_version_is_told_once():
    assert PYPROJECT["project"]["version"] == distill_core.__version__
    assert f"## {distill_core.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_console_script_is_the_command_line(capsys):
    module, function = PYPROJECT["project"]["scripts"]["turbo-distill"].split(":")
    assert getattr(importlib.import_module(module), function)(["presets", "flux-schnell"]) == 0
    assert "schnell" in capsys.readouterr().out
