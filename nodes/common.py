"""What all nodes share."""

from __future__ import annotations

CATEGORY = "turbo distill"
OF_PRESET = "of the preset"
SEED_MAX = 0xFFFFFFFFFFFFFFFF


def first_of_each(inputs: dict[str, list]) -> dict:
    """The single values of inputs that a node with ``is_input_list`` gets as lists."""
    return {name: values[0] for name, values in inputs.items()}
