"""run.html in a run's folder: curves, samples over time, settings and messages on one page that needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import read_json, replacing
from ..training.loop import Event
from ..training.monitor import Condition, Health
from ..training.run_folder import RunFolder
from . import live_plots
from .student_pictures import StudentPictures

MOST_SAMPLES = 40  # on the page; all are in the folder
MOST_CHANGES = 30  # of the status word that are listed
WIDTH, HEIGHT = 1100, 560  # of the curves, in pixels
REFRESH = 20  # seconds between looks of a browser at a page that still grows
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1120px;padding:0 1em;color:#222}"
    "img{max-width:100%}figure{margin:0 0 1em}figcaption{color:#666}table{border-collapse:collapse}"
    "td{padding:.1em 1em .1em 0;vertical-align:top;border-bottom:1px solid #eee;overflow-wrap:anywhere}"
)


class RunPage:
    """A watcher of `training.run.train_to_end` that keeps a run's pictures and its page; close it with ``with``.

    settings: of the run, as `RunConfig.request` gives them.  pictures: draws the student, None for no samples.
    every: steps between pictures (0: none).  write_every: steps between writings of the page beside those.

    A picture must not end a run: when one cannot be drawn, that is said on the page, and no more are.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: dict[str, Any],
        pictures: Callable[[], Image.Image] | None = None,
        *,
        every: int,
        write_every: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.settings, self.say = folder, settings, say
        self.pictures, self.every, self.write_every = pictures, every, write_every
        self.shared = pictures if isinstance(pictures, StudentPictures) else None  # also when no more are drawn
        self.latest: Image.Image | None = None  # the last samples
        self.drawn = 0  # at which step

    def __call__(self, event: Event, condition: Condition) -> None:
        last, due = event.step == event.steps, self.due(event)
        if due and self.pictures is not None:
            self._draw(event.step)
        if due or last or event.step % self.write_every == 0:
            self.write()

    def take(self, event: Event, condition: Condition) -> None:
        """A watcher for every process of a run whose weights are shared out, before the page: all sample together."""
        if self.shared is not None and self.due(event):
            self.shared.take()

    def due(self, event: Event) -> bool:
        """Whether the student is drawn after a step."""
        return bool(self.every) and (event.step % self.every == 0 or event.step == event.steps)

    def _draw(self, step: int) -> None:
        try:
            self.latest, self.drawn = self.pictures(), step  # type: ignore[misc]
            path = samples_folder(self.folder) / f"step{step:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.latest.save(path, quality=90)
        except (RuntimeError, OSError) as error:  # memory, most of all
            self.pictures = None
            text = f"step {step}: no more samples are drawn: {str(error).splitlines()[0]}"
            self.say(text)
            with suppress(OSError):
                note(self.folder, text)

    def write(self, running: bool = True) -> None:
        try:
            write_page(self.folder, self.settings, running)
        except OSError as error:  # what fails to be written next is worth an end, this is not
            self.say(f"the page of the run could not be written: {error}")

    def __enter__(self) -> RunPage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not self.folder.log.exists():
            return
        if kind is None:
            return self.write(running=False)
        with suppress(OSError):
            steps = [entry["step"] for entry in self.folder.logs()]
            note(self.folder, f"stopped after step {max(steps, default=0)}{f': {error}' if str(error) else ''}")
        self.write()


def samples_folder(folder: RunFolder) -> Path:
    return folder.path / "samples"


def note(folder: RunFolder, text: str) -> None:
    """Add a message to those of the run, unless it is there."""
    if text not in messages(folder):
        with open(folder.path / "messages.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(text) + "\n")


def messages(folder: RunFolder) -> list[str]:
    path = folder.path / "messages.jsonl"
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    return [text for line in lines if isinstance(text := _parsed(line), str)]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # cut off by a crash
        return None


def write_page(folder: RunFolder, settings: dict[str, Any] | None = None, running: bool = False) -> Path:
    """Write run.html from what is in the folder; its path.

    settings: None for those of the run's report.  running: a browser is to look at the page again.
    """
    path = folder.path / "run.html"
    if settings is None:
        settings = read_json(folder.report).get("request", {}) if folder.report.is_file() else {}
    page = page_of(folder, folder.logs(), settings, running)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def page_of(folder: RunFolder, logs: Sequence[dict[str, Any]], settings: dict[str, Any], running: bool) -> str:
    """The page as HTML."""
    name, steps, done = folder.path.name, settings.get("steps") or 0, logs[-1]["step"] if logs else 0
    condition = Health().replay(logs)
    state = f"step {done} of {steps}" + (f"; {condition.word}: {condition.advice}" if condition else "")
    growing = f'<meta http-equiv="refresh" content="{REFRESH}">' if running and done < steps else ""
    parts = [
        f"<h1>{escape(name)}</h1><p>{escape(state)}</p>",
        figure(live_plots.curves(logs, WIDTH, HEIGHT), "PNG"),
        *section("Samples over time", samples(folder)),
        *section("Teacher and student", before_and_after(folder)),
        *section("Messages", [f"<p>{escape(text)}</p>" for text in [*messages(folder), *health(logs)]]),
        *section("Settings", [table(flat(settings))]),
    ]
    head = f'<meta charset="utf-8">{growing}<title>{escape(name)}</title><style>{STYLE}</style>'
    return "<!doctype html>\n<html><head>" + head + "</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def section(title: str, content: list[str]) -> list[str]:
    return [f"<h2>{title}</h2>", *content] if content else []


def samples(folder: RunFolder) -> list[str]:
    """The kept samples, evenly chosen where there are many, the last one among them."""
    paths = sorted(samples_folder(folder).glob("step*.jpg"))
    count = min(MOST_SAMPLES, len(paths))
    chosen = [paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)]
    return [embedded(path.read_bytes(), "jpeg", f"step {int(path.stem.removeprefix('step'))}") for path in chosen]


def before_and_after(folder: RunFolder) -> list[str]:
    """The finished run's report, where one was drawn."""
    path = folder.path / "report.png"
    return [embedded(path.read_bytes(), "png", "")] if path.is_file() else []


def health(logs: Sequence[dict[str, Any]]) -> list[str]:
    """When the status word changed, at last."""
    runs = groupby(logs, key=lambda entry: entry.get("health", ""))
    return [f"from step {next(entries)['step']}: {word}" for word, entries in runs if word][-MOST_CHANGES:]


def figure(picture: Image.Image, kind: str) -> str:
    data = io.BytesIO()
    picture.save(data, kind)
    return embedded(data.getvalue(), kind.lower(), "")


def embedded(data: bytes, kind: str, caption: str) -> str:
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/{kind};base64,{base64.b64encode(data).decode()}">{said}</figure>'


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Dotted names of all values."""
    if not isinstance(settings, dict):
        return {path: settings}
    parts = [flat(value, f"{path}.{key}".lstrip(".")) for key, value in settings.items()]
    return {name: value for part in parts for name, value in part.items()}


def table(values: dict[str, Any]) -> str:
    rows = [f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in values.items()]
    return "<table>" + "".join(rows) + "</table>"
