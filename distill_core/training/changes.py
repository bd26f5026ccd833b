"""What differs between a run that is asked for and the one that is there, in the words of whoever asks."""

from __future__ import annotations

from collections.abc import Callable

from ..changes import Changes, changes_between, spell_change
from ..methods.registry import METHODS

# Identities whose values say nothing to a reader.
DIGESTS = ("base", "dataset", "teacher", "vae", "vision_network", "perceptual", "start_from")


class OtherSettings(ValueError):
    """A run does not go on because it was begun with other settings.

    changes: what differs.  where: of the run.  cure: what to do, with the names that ``words`` was made for.
    """

    def __init__(self, where: str, changes: Changes, cure: str) -> None:
        self.where, self.changes, self.cure = where, told_one_by_one(changes), cure
        super().__init__(self.said())

    def said(self, word: Callable[[str], str] = lambda name: name, cure: str = "") -> str:
        """The sentence with each name as ``word`` has it (a widget's or a key's)."""
        changes = "; ".join(
            spell_change(word(name), *values, by_value=name not in DIGESTS) for name, values in self.changes.items()
        )
        return f"{self.where} belongs to a run with other settings ({changes}); {cure or self.cure}"


def told_one_by_one(changes: Changes) -> Changes:
    """The changes as a reader looks for them.

    A table that only one of the runs has is told by its entries. A method that took another's place is one change: its
    settings and sections are not the old one's.
    """
    now, before = (next((name for name in METHODS if changes.get(name, (None, None))[i]), "") for i in (0, 1))
    other_method = now and before and now != before
    told: Changes = {"method": (now, before)} if other_method else {}
    for name, (value, old) in changes.items():
        whole = None in (value, old) and isinstance(value or old or {}, dict)
        if whole and "." in name:
            told |= changes_between(value or {}, old or {}, name)
        elif not (whole and other_method):
            told[name] = value, old
    return told
