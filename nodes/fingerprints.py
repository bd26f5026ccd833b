"""Fingerprints of nodes that write files: the same as long as the files are as the node left them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any


class Left:
    """A node's fingerprints by the name of what it writes.

    The host asks for a fingerprint before it runs a node, and what the node then writes must not change it: otherwise
    the next queue of the same workflow would run it again. So a fingerprint is no date. It is a number that goes up
    when the files are not those that the node left.

    state: of the files under a name, anything that differs when they do.
    """

    def __init__(self, state: Callable[[str], Hashable]) -> None:
        self.state, self.seen = state, {}

    def fingerprint(self, name: Any) -> float:
        """The number for a name; NaN, which is never the same, for one that is only known when the node runs."""
        if not isinstance(name, str):
            return math.nan
        now = self.state(name)
        before, number = self.seen.get(name, (now, 0))
        self.seen[name] = now, number + (now != before)
        return float(self.seen[name][1])

    def note(self, name: str) -> None:
        """The node has run: its files are as they should be."""
        _, number = self.seen.get(name, (None, 0))
        self.seen[name] = self.state(name), number


def dates(*paths: Path) -> tuple[int | None, ...]:
    """When each file was written; None for one that is not there."""
    return tuple(path.stat().st_mtime_ns if path.is_file() else None for path in paths)
