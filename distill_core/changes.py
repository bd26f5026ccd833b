"""What differs between two JSON descriptions: of a run, or of a dataset."""

from __future__ import annotations

from typing import Any

Changes = dict[str, tuple[Any, Any]]  # dotted name -> (now, before)


def changes_between(now: Any, before: Any, path: str = "") -> Changes:
    """Dotted names of what differs between two JSON values, with both values."""
    if isinstance(now, dict) and isinstance(before, dict):
        keys = sorted(now.keys() | before.keys())
        parts = [changes_between(now.get(key), before.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
        return {name: values for part in parts for name, values in part.items()}
    return {} if now == before else {path: (now, before)}


def spell_change(word: str, now: Any, before: Any, by_value: bool = True) -> str:
    """ "steps is 4 now, was 8"; values that say nothing to a reader (digests) are left out where not ``by_value``."""
    if not by_value:
        return f"{word} is another one now"
    return f"{word} is {_value(now)} now, was {_value(before)}"


def _value(value: Any) -> str:
    if value in (None, "", [], {}):
        return "left out"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
