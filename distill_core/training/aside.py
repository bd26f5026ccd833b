"""Starting a run again under its name, without losing the one that is there."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from ..files import alone_in
from .run_folder import RunFolder


def put_aside(folder: RunFolder, student_file: str | Path) -> str:
    """Give a run another name: its folder, its student and its snapshots; the name, "" where there is no run yet.

    student_file: NAME.safetensors, after the folder's name. It is renamed first: a run that still has its folder is
    only finished once more if this is cut short. Raises ValueError while another process trains there.
    """
    path, student = folder.path, Path(student_file)
    if not student.exists() and not folder.log.exists() and not any(path.glob("*.safetensors")):
        return ""
    with alone_in(path, "training"):
        pass  # nobody else is at work there

    def called(file: Path, name: str) -> Path:
        return file.with_name(name + file.name.removeprefix(path.name))

    names = (f"{path.name}_old{number}" for number in count(1))
    name = next(n for n in names if not path.with_name(n).exists() and not called(student, n).exists())
    for file in [student, *student.parent.glob(f"snapshots/{student.stem}_step*.safetensors")]:
        if file.exists():
            file.rename(called(file, name))
    path.rename(path.with_name(name))
    return name
