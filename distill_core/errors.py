"""What goes wrong with files, disks and what others' loaders make of them, as one sentence with its cure.

Readers and writers raise ValueError with such a sentence where they know more; `sentence` has the words for what
reaches the end of a command or a node as it is.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

GO_ON = "what was saved before is as it was, and the same command or node goes on from there"
CURES = {
    errno.ENOSPC: f"cannot be written: the disk is full. Make room; {GO_ON}",
    errno.EDQUOT: f"cannot be written: the disk quota is used up. Make room; {GO_ON}",
    errno.EFBIG: f"cannot be written: the file would be larger than this system allows; {GO_ON}",
    errno.EROFS: "cannot be written: the disk is read-only. Choose a folder on another disk",
    errno.ENOTDIR: "would lie in a file, not in a folder. Choose another folder, or move that file away",
    errno.EEXIST: "is a file where a folder is wanted. Choose another folder, or move that file away",
    errno.ENAMETOOLONG: "has a name that is too long for the disk. Choose a shorter one",
    errno.ELOOP: "is a link that leads in a circle. Remove it, or choose another folder",
    errno.EMFILE: "cannot be opened: this process has too many files open (see ulimit -n)",
    errno.EIO: "cannot be read or written: the disk fails. Look at the disk, or restore a copy",
}
TROUBLE = (OSError, SafetensorError, json.JSONDecodeError, UnicodeError, RecursionError)


def sentence(error: BaseException, path: str | Path | None = None) -> str | None:
    """The words for one of `TROUBLE`, about the file at ``path`` or the one the error names; None for another error."""
    if isinstance(error, OSError):
        named = path if path is not None else error.filename
        if isinstance(error, FileNotFoundError) and named is not None:
            return f"there is no file {named}; look at its path, or make it again if it was deleted"
        if path is not None and Path(path).is_dir():  # safetensors has another number for it
            return f"{path} {_why(IsADirectoryError(), reading=True)}"
        if named is None and error.errno in CURES:
            named = "a file"
        known = named is not None and (error.errno or path)
        return f"{named} {_why(error, reading=path is not None)}" if known else first_line(error)
    name = "a file that is read" if path is None else path
    if isinstance(error, SafetensorError):
        return f"{name} is not a complete safetensors file ({error}); delete it and make it again, or restore a copy"
    if isinstance(error, json.JSONDecodeError):
        return f"{name} is not valid JSON (line {error.lineno}: {error.msg}); delete it, or restore a copy"
    if isinstance(error, RecursionError):
        return f"{name} is nested too deeply to be read; delete it, or restore a copy"
    if isinstance(error, UnicodeError):
        return f"a text or name cannot be written as UTF-8 ({error.reason}); type it again"  # type: ignore[attr-defined]
    return None


def _why(error: OSError, reading: bool) -> str:
    if isinstance(error, IsADirectoryError):
        return "is a folder where a file is wanted; give a file"
    if isinstance(error, PermissionError):
        what = "read" if reading else "read or written"
        return f"may not be {what} by this user (permission denied); change its owner or mode (chmod u+rw)"
    usual = f"cannot be read or written ({error.strerror or first_line(error)}). Look at the disk, or restore a copy"
    return CURES.get(error.errno or 0, usual)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line that any file or log can hold."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str) -> str:
    """The text with what cannot be written as UTF-8 (half of a surrogate pair) spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def opening(path: str | Path, what: str) -> Iterator[None]:
    """Whatever another library's loader says of a damaged or foreign file becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:
        said = first_line(error).rstrip(".")
        raise ValueError(f"{path} cannot be opened as {what} ({said}). Is it complete? Copy it again") from error


def has_errno(text: str) -> int:
    """The number of the system's error in a text of safetensors, 0 where there is none."""
    _, found, rest = text.partition("(os error ")
    number = rest.split(")")[0]
    return int(number) if found and number.isdigit() else 0


def write_error(error: BaseException, path: str | Path) -> OSError:
    """An OSError that names the file, from what safetensors says of a write that failed."""
    number = has_errno(str(error))
    return OSError(number, os.strerror(number), str(path)) if number else OSError(f"cannot write {path}: {error}")


def package(name: str, user: str) -> Any:
    """An optional package. user: what needs it. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{user} needs the package {name}: install it with `pip install {name}` into the Python that trains, or "
            f"choose another ({error})"
        ) from error
