"""Text files with prompts: the one that comes with the pack, and those in the host's input folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...distill_core.data.kept import ASSORTED

NO_FILE, SHIPPED = "none", "assorted (shipped)"


def text_files() -> list[str]:
    """The .txt files in the host's input folder."""
    return sorted(path.name for path in Path(folder_paths.get_input_directory()).glob("*.txt"))


def path_of(file: str) -> Path | None:
    """Where a choice of the widget lies; None for no file. Raises ValueError for a name that is not in the folder."""
    if file == NO_FILE:
        return None
    path = ASSORTED if file == SHIPPED else Path(folder_paths.get_input_directory(), Path(file).name)
    if not path.is_file():
        raise ValueError(f"there is no {file!r} in ComfyUI's input folder; press R to read the folder again")
    return path


def lines_of(file: str) -> list[str]:
    """The file's lines; none for no file."""
    path = path_of(file)
    return path.read_text(encoding="utf-8-sig").splitlines() if path else []


def date_of(file: str) -> float:
    """When the file was last changed; 0 for no file, or where it is gone."""
    try:
        path = path_of(file)
    except ValueError:
        return 0.0
    return path.stat().st_mtime if path else 0.0
