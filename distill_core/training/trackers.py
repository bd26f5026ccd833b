"""A run's figures in TensorBoard and other trackers, by accelerate's own classes for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import first_line, package
from .loop import Event
from .monitor import Condition


class Trackers:
    """Hands the figures of each step on to the trackers of these names; one that fails is left out from then on.

    folder: of the run. Its name is that of the project, and trackers that keep files keep them in ``trackers`` there.
    settings: of the run, by name.  Raises ValueError for a tracker whose package is missing or that does not start.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: dict[str, Any]) -> None:
        self.trackers = [_started(name, folder, settings) for name in names]

    def __call__(self, event: Event, condition: Condition) -> None:
        for tracker in list(self.trackers):
            try:
                tracker.log(event.logs, step=event.step)
            except Exception as error:  # of whatever service; the run goes on without it
                logging.warning("the tracker %s failed and is left out: %s", tracker.name, first_line(error))
                self.trackers.remove(tracker)

    def close(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:
                logging.warning("the tracker %s did not end well: %s", tracker.name, first_line(error))


def _started(name: str, folder: Path, settings: dict[str, Any]) -> Any:
    for needed in ("accelerate", name):
        package(needed, f'tracker "{name}"')
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder / "trackers")} if kind.requires_logging_directory else {}
    try:
        tracker = kind(folder.name, **place)
        tracker.start()
        plain = (bool, int, float, str)
        tracker.store_init_configuration({k: v if isinstance(v, plain) else str(v) for k, v in settings.items()})
    except Exception as error:  # not logged in, no network, ...
        raise ValueError(f'tracker "{name}" does not start: {first_line(error)}; leave it out of trackers') from error
    return tracker
