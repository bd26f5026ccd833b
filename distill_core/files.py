"""Files on disk: written to a temporary name and renamed, safetensors and JSON only, self-describing.

A reader finds either the previous file or the complete new one, whatever happens to the writing process.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import first_line, sentence, write_error

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to; at the end of the block the file takes the place of ``path``, its bytes on the disk.

    The name is in a folder beside ``path``, where also the writer's own temporary files lie (safetensors makes one).
    If the block fails, ``path`` is as it was and the folder is gone; what a killed process left is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_abandoned(left):
            remove(left)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(usual_mode())  # safetensors makes its files for their owner only
        os.replace(temporary, path)
    finally:
        remove(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there and if that is allowed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_abandoned(temporary: Path) -> bool:
    """Whether the process that made this folder of `replacing` (a file until version 0.2) is gone."""
    pid = temporary.suffixes[-2].lstrip(".") if len(temporary.suffixes) > 1 else ""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    if os.name == "nt":  # os.kill would end it there
        return time.time() - temporary.stat().st_mtime > 3600
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; its bytes are on the disk before the old file is replaced.

    The same tensors and metadata are the same bytes, in every process (`sort_metadata`).
    Raises OSError when it cannot be written (a full disk); the old file is then as it was.
    """
    with replacing(path) as temporary:
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise write_error(error, path) from error
        if metadata:
            sort_metadata(temporary)


def sort_metadata(path: str | Path) -> None:
    """Put the metadata of a safetensors file in the order of their names; the library's order is a random one.

    The header is JSON of a length that stands before it in 8 bytes, padded with spaces; sorted it is as long.
    """
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def usual_mode() -> int:
    """The mode that a new file of this process has: read and write, less the umask."""
    mask = os.umask(0o022)  # there is no call that only reads it
    os.umask(mask)
    return 0o666 & ~mask


def save_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically. Raises OSError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def alone_in(folder: str | Path, doing: str) -> Iterator[None]:
    """Work in a folder that no other process works in; the system gives the lock back when a process dies.

    doing: what is done there, for the message.  The lock is on the empty file ``.lock``, which stays; ``.holder.json``
    says who has it.
    Raises ValueError while another process has it.
    """
    holder = Path(folder) / ".holder.json"
    holder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(holder.with_name(".lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process{_spell(holder)} is {doing} in {folder}: wait until it ends, stop it, or choose another "
            "folder or name"
        ) from None
    try:
        save_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _spell(holder: Path) -> str:
    try:
        said = json.loads(holder.read_text())
        return f" (number {said['pid']} on {said['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # just being written, or just gone
        return ""


def read_text(path: str | Path) -> str:
    """A text file as people write them: UTF-8, with or without a byte order mark, any line ends.

    Raises ValueError, naming the file and what to do, where it is missing, a folder, unreadable or in another encoding.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(sentence(error, path)) from error
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{raw[error.start]:02x} in line {line}"
        raise ValueError(f"{path} is not UTF-8 text ({kind}); save it as UTF-8 in your editor") from error


def read_json(path: str | Path, cure: str = "delete it, or restore a copy") -> dict[str, Any]:
    """A file with one JSON object. Raises ValueError, naming the file, for anything else."""
    return parse_object(read_text(path), str(path), cure)


def parse_object(text: str, where: str, cure: str = "delete it, or restore a copy") -> dict[str, Any]:
    """A JSON object. Raises ValueError, beginning with ``where``, for what is no JSON, or another kind of value."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: it is not valid JSON ({first_line(error)}); {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is damaged: it holds {type(content).__name__} where an object is wanted; {cure}")
    return content


def check_finite(tensors: Mapping[str, Tensor], where: str | Path, cure: str) -> None:
    """Raises ValueError that names the first tensor with a value that is not finite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{where} is damaged: {name} has values that are not finite (NaN or infinite); {cure}")


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError for a missing, truncated or foreign file.

    The tensors are copies: views of the mapped file would keep it open, and Windows does not replace open files.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except OSError as error:
        raise ValueError(sentence(error, path)) from error
    except SafetensorError as error:
        raise ValueError(sentence(error, path)) from error


def git_commit() -> str:
    """The commit of this source tree, or "unknown" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
