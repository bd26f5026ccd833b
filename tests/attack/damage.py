"""Ways to damage a file: cut, foreign, of another kind, with values that nobody should find."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
JSON_TEXTS = [
    *("", "{", "null", "[]", "3", '"text"', "true", "NaN", "{}", "[" * 100000, '{"a": ' * 5000, "\ufeff{}", "{'a': 1}"),
    *('{"guidance": null}', '{"guidance": "x", "config": []}', '{"config": 3, "guidance": NaN}', "\x00\x00"),
]


def _rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """A safetensors file with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})
    change(tensors, metadata)
    path.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def _any_file(draw: random.Random, path: Path) -> str:
    raw = path.read_bytes()
    way = draw.choice(
        ["empty", "cut", "foreign", "gone", "folder", "noise", "flipped byte", "longer", "circle", "UTF-16"]
    )
    if way in ("gone", "folder", "circle"):
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "circle":
            path.symlink_to(path.name)
        return way
    position = draw.randrange(max(1, len(raw)))
    content = {
        "empty": b"",
        "cut": raw[:position],
        "foreign": PNG,
        "noise": draw.randbytes(min(1000, len(raw) + 1)),
        "flipped byte": raw[:position] + bytes([raw[position] ^ 0x41 if raw else 0]) + raw[position + 1 :],
        "longer": raw + draw.randbytes(100),
        "UTF-16": b"\xff\xfe" + "text".encode("utf-16-le"),
    }[way]
    path.write_bytes(content)
    return way


def _tensors(draw: random.Random, path: Path) -> str:
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata() or {}
    name, key = draw.choice(names), draw.choice([*metadata, "added"])
    ways: dict[str, Callable[[dict, dict], None]] = {
        "NaN": lambda t, m: t.update({name: torch.full_like(t[name].float(), float("nan"))}),
        "infinite": lambda t, m: t.update({name: torch.full_like(t[name].float(), float("inf"))}),
        "key gone": lambda t, m: t.pop(name),
        "key more": lambda t, m: t.update({"nobody.knows.it": torch.zeros(3)}),
        "key renamed": lambda t, m: t.update({f"x{name}": t.pop(name)}),
        "flat": lambda t, m: t.update({name: t[name].flatten()}),
        "scalar": lambda t, m: t.update({name: torch.tensor(1.0)}),
        "no rows": lambda t, m: t.update({name: t[name].reshape(-1)[:0]}),
        "all without rows": lambda t, m: t.update({n: v[:0] if v.ndim else v for n, v in t.items()}),
        "doubled": lambda t, m: t.update({name: torch.stack([t[name], t[name]])}),
        "whole numbers": lambda t, m: t.update({name: torch.zeros(t[name].shape, dtype=torch.int64)}),
        "no tensors": lambda t, m: t.clear(),
        "no metadata": lambda t, m: m.clear(),
        "metadata text": lambda t, m: m.update(
            {key: draw.choice(["", "null", "[]", "{", "-1", "NaN", "[null]", '["a"]'])}
        ),
        "metadata JSON": lambda t, m: m.update({key: draw.choice(JSON_TEXTS)}),
        "another step": lambda t, m: m.update(_other_step(draw, m)),
    }
    way = draw.choice(list(ways))
    _rewrite(path, ways[way])
    return f"{way} ({key})" if "metadata" in way else way


def _other_step(draw: random.Random, metadata: dict) -> dict:
    if "run" not in metadata:
        return {}
    step = draw.choice([None, 0, -1, 1.5, "3", 1e12, float("nan"), [], True])
    return {"run": json.dumps({**json.loads(metadata["run"]), "step": step})}


def _json(draw: random.Random, path: Path) -> str:
    """Another JSON text, or another value at one key."""
    text, way = draw.choice(JSON_TEXTS), "JSON text"
    if draw.random() < 0.5:
        content = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
        if isinstance(content, dict) and content:
            key = draw.choice(list(content))
            content[key] = draw.choice([None, [], {}, -1, "text", [None], float("nan"), 1e400])
            text, way = json.dumps(content), f"JSON value ({key})"
    path.write_text(text)
    return way


def _toml(draw: random.Random, path: Path) -> str:
    lines = path.read_text().splitlines()
    values = [
        "nan",
        "inf",
        "-1",
        "0",
        "1e308",
        "9" * 30,
        '"text"',
        "true",
        "[]",
        "{}",
        '"\\u0000"',
        "[[1]]",
        "1979-05-27",
    ]
    keys = [i for i, line in enumerate(lines) if " = " in line]
    chosen = draw.choice(keys)
    lines[chosen] = f"{lines[chosen].split(' = ')[0]} = {draw.choice(values)}"
    path.write_text("\n".join(lines))
    return f"TOML value ({lines[chosen].split(' = ')[0]})"


def _lines(draw: random.Random, path: Path) -> str:
    """A text of prompts or a log with a line nobody wrote."""
    odd = draw.choice(
        ["{", "null", "[1]", "\x00", "nobody", "{}", '{"step": null}', '{"step": 1}', "\ufeffbag", " " * 9]
    )
    lines = path.read_text().splitlines()
    lines.insert(draw.randint(0, len(lines)), odd)
    path.write_text("\n".join(lines) + "\n")
    return f"line {odd[:12]!r}"


OWN = {".safetensors": _tensors, ".json": _json, ".toml": _toml, ".txt": _lines, ".jsonl": _lines}


def damage(draw: random.Random, path: Path) -> str:
    """Damage a file in a random way; returns which."""
    own = OWN.get(path.suffix, _any_file)
    return (own if draw.random() < 0.65 else _any_file)(draw, path)
