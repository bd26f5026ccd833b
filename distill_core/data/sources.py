"""Pairs of pictures for models that edit: each picture's source, of the same name in another folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..digests import file_digest
from .pictures import Picture, open_picture, reason, with_partners


def with_sources(pictures: Sequence[Picture], folder: str | Path) -> tuple[list[Picture], dict[str, str]]:
    """The pictures whose source is in ``folder`` under their own name, with its digest, and the names of the others
    with the reason.

    Raises ValueError when none has one.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"[pictures] sources: {root} is not a folder; give that of the pictures before they are edited"
        )

    def source(picture: Picture) -> Picture | str:
        path = root / picture.name
        return _fault(path, picture) or picture._replace(source=path, source_digest=file_digest(path))

    return with_partners(pictures, source, f"no picture has a source in {root}")


def _fault(path: Path, picture: Picture) -> str:
    if not path.is_file():
        return "has no source of that name"
    try:
        size = open_picture(path, "white").size
    except Exception as error:  # whatever a decoder makes of a damaged file
        return f"has a source that cannot be read ({reason(error, path)})"
    return (
        "" if size == picture.size else f"is {picture.size[0]} x {picture.size[1]} and its source {size[0]} x {size[1]}"
    )
