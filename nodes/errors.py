"""What no node of the pack takes, and trouble with files in the core's words; in text that the host can log."""

from __future__ import annotations

import functools
from typing import Any

from comfy_api.latest import io

from ..distill_core.errors import TROUBLE, printable, sentence
from ..distill_core.settings import check_value


def in_words(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose errors about files and values are sentences.

    The host validates what a widget's range says, which lets NaN pass, and takes any JSON value where a link belongs.
    It also writes each error to its log, and a text that is no Unicode (half of a surrogate pair) would end the thread
    that works through the queue: such text is refused, and spelled out.
    """
    own = [cls for cls in node.__mro__ if not issubclass(io.ComfyNode, cls)]
    for name in ("execute", "fingerprint_inputs"):
        if any(name in vars(cls) for cls in own):
            setattr(node, name, classmethod(_told(getattr(node, name).__func__)))
    return node


def _told(method):
    @functools.wraps(method)
    def call(cls, *args, **inputs):
        try:
            if method.__name__ == "execute":
                check_inputs(cls.define_schema(), inputs)
            return method(cls, *args, **inputs)
        except (ValueError, *TROUBLE) as error:
            text = printable(sentence(error) or str(error))
            if text == str(error) and not isinstance(error, TROUBLE):
                raise
            raise ValueError(text) from None

    return call


def check_inputs(schema: io.Schema, inputs: dict[str, Any]) -> None:
    """Raises ValueError for a plain value where a link belongs, and for numbers and texts that no setting takes."""
    for entry in schema.inputs:
        if entry.id not in inputs:
            continue
        given = inputs[entry.id]
        for value in given if schema.is_input_list else [given]:
            if isinstance(entry, io.WidgetInput):
                check_value(entry.id, value)
            elif is_plain(value) and not (entry.optional and value is None):
                raise ValueError(
                    f"{entry.id} must be connected to an output of type {entry.io_type}, not be {value!r:.60}"
                )


def is_plain(value: Any) -> bool:
    """Whether a value is what JSON can say: without a tensor, a model, or a class."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)
