"""The folder of a run: its name, its log, and what says that it has begun and ended."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from ..files import parse_object, read_json, save_json
from .loop import Event
from .monitor import Condition, Health

NAME = re.compile(r"[\w][\w .+-]*")
MOST_BYTES = 200  # of a name: disks take 255, and files are named after it
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}


def folder_in(root: str | Path, name: str, what: str = "run name") -> Path:
    """The folder ``name`` directly inside ``root``; letters with accents count as one, however they were typed.

    It may be a link to a folder, on a larger disk say: only who can write into ``root`` makes links there.
    Raises ValueError for a name that is empty, longer than 200 bytes in UTF-8, has anything but letters, digits, spaces
    and ``_ . + -``, could lead out of ``root``, or is a link to no folder.
    """
    name, root = unicodedata.normalize("NFC", name.strip()), Path(root).resolve()
    if len(name.encode("utf-8", "replace")) > MOST_BYTES:
        raise ValueError(
            f"{what} {name[:20]!r}... cannot be a folder inside {root.name}: it is longer than {MOST_BYTES} bytes"
        )
    fits = NAME.fullmatch(name) and not name.endswith(".") and name.split(".")[0].lower() not in RESERVED
    if fits and (root / name).is_symlink() and not (root / name).is_dir():  # nothing, a file, or a circle
        raise ValueError(f"{what} {name!r} is a link that leads to no folder: remove it, or choose another name")
    if not fits:
        raise ValueError(
            f"{what} {name!r} cannot be a folder inside {root.name}: use letters, digits, spaces and _ . + - "
            "(no slashes; the first character a letter or digit)"
        )
    return root / name


class RunFolder:
    """log.jsonl (a line a step), what it goes on from (`checkpoints`), report.json (once it has ended)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    def logs(self) -> list[dict[str, Any]]:
        """The logs of all steps so far, ``step`` and ``health`` among them; a line cut off by a crash is left out."""
        entries = []
        for line in self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else ():
            try:
                entry = parse_object(line, str(self.log))
            except ValueError:
                break
            if not isinstance(entry.get("step"), int):
                break
            entries.append(entry)
        return entries

    def condition(self) -> Condition | None:
        """How the run was doing at its last step, None before the first."""
        return Health().replay(self.logs())

    def keep_log(self, step: int) -> None:
        """Drop the lines of the log after a step: the run is there, or goes on from there."""
        kept = [json.dumps(entry) + "\n" for entry in self.logs() if entry["step"] <= step]
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.log.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.log)

    def start(self, **facts: Any) -> None:
        """Note what the run is made from, for who looks at it later."""
        save_json(self.path / "started.json", facts)

    def started(self) -> dict:
        """What `start` noted. Raises ValueError where there is no run."""
        path = self.path / "started.json"
        if not path.exists():
            raise ValueError(f"there is no run in {self.path}")
        return read_json(path, "queue the run again, which writes it anew")

    def finish(self, request: dict[str, Any], **results: Any) -> None:
        """Say that what was requested (`RunConfig.request`) is done."""
        save_json(self.report, {"request": request, **results})

    def finished(self, request: dict[str, Any]) -> dict | None:
        """The report of a run that has ended and was requested in the same words; None for any other."""
        try:
            report = read_json(self.report)
        except ValueError:  # not there, or damaged: then the run ends once more
            return None
        return report if report.get("request") == json.loads(json.dumps(request)) else None


class LogFile:
    """Writes a run's log. After a crash it goes on where the checkpoint does: later lines are dropped."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.file: Any = None  # opened at the first step, when it is known where the run goes on

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.file is None:
            self.folder.keep_log(event.step - 1)
            self.file = open(self.folder.log, "a")
        self.file.write(json.dumps({"step": event.step, **event.logs, "health": condition.word}) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
