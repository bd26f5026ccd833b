"""What all nodes share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..distill_core.settings import help_of, range_of

CATEGORY = "turbo distill"
OF_PRESET = "of the preset"
SEED_MAX = 0xFFFFFFFFFFFFFFFF


def first_of_each(inputs: dict[str, list]) -> dict:
    """The single values of inputs that a node with ``is_input_list`` gets as lists."""
    return {name: values[0] for name, values in inputs.items()}


def seed_input(tooltip: str, **options: Any) -> io.Int.Input:
    """The seed of a node's noise, which stays as it is from one queue to the next."""
    fixed = io.ControlAfterGenerate.fixed
    return io.Int.Input(
        "seed", default=0, min=0, max=SEED_MAX, control_after_generate=fixed, tooltip=tooltip, **options
    )


def setting_input(kind: Any, config: type, name: str, more: str = "", widget: str = "", **options: Any) -> Any:
    """An optional input for a setting of the core, with its words and its range. ``more`` is said after the words;
    ``options`` come before the range."""
    words, allowed = " ".join([help_of(config, name), more]).strip(), range_of(config, name)
    if kind is io.Combo:
        options.setdefault("options", list(allowed.choices))
    elif kind in (io.Int, io.Float):
        number = int if kind is io.Int else float
        limits = {"min": allowed.low, "max": allowed.high}
        options = {key: number(limit) for key, limit in limits.items() if limit is not None} | options
    return kind.Input(widget or name, optional=True, tooltip=words, **options)
