"""One ComfyUI server for all host tests of a session; without a ComfyUI they are skipped, and the summary says so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_pack
import pytest
from server import HERE, HOST_FOUND, HOW_TO, PYTHON, Host

MODEL_FOLDERS = ("checkpoints", "clip", "diffusion_models", "loras", "vae")  # of the host's output folder


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there is no host."""
    if not HOST_FOUND:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="ComfyUI not found"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one loud line that the host tests did not run, and how to make them run."""
    if not HOST_FOUND:
        terminalreporter.write_line(HOW_TO, yellow=True, bold=True)
    elif not gguf_pack.found(PYTHON):
        terminalreporter.write_line(gguf_pack.HOW_TO, yellow=True, bold=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A ComfyUI server with this repository as a custom node pack, stopped at the end."""
    server = Host(tmp_path_factory.mktemp("comfyui"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def host(server: Host) -> Host:
    """The server as new for each file of tests: no run or dataset of another file, and nothing in its cache.

    Folders that the host lists models of stay, though empty: it keeps the lists and asks the folders for their age.
    """
    server.forget()
    for path in (server.base_dir / "output").glob("*"):
        for unwanted in path.glob("*") if path.name in MODEL_FOLDERS else [path]:
            remove(unwanted)
    return server
