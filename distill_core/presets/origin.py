"""Above which model a student's file was made, compared with the model that it is used on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NotRequired, TypedDict

NAME_KEYS = ("ss_output_name", "modelspec.title")  # where LoRA files say their own name


class LoraBelow(TypedDict):
    """A LoRA that was on the model when a student was trained: a hash of its tensors, its strength, its layers."""

    digest: str
    strength: float
    layers: int
    name: NotRequired[str]


def name_of(lora: LoraBelow) -> str:
    """A LoRA in words: its name where it is known, else its digest."""
    return f"{lora.get('name') or lora['digest']} at strength {lora['strength']:g}"


def origin_notes(described: Mapping[str, str], base: str, layout: str, loras: Iterable[LoraBelow]) -> list[str]:
    """What is to be said of a student that is used on a model: each a sentence, none where nothing is known to differ.

    described: the file's metadata without its prefix (`lora_files.save_lora`).
    base, loras: of the model it is used on.
    layout: whose names of layers these digests are over; files made with other names cannot be compared.
    """
    notes = []
    comparable = described.get("base_layout", "diffusers") == layout
    if comparable and described.get("base", base) != base:
        notes.append(
            f"this student was made above another model (its base is {described['base']}, this one is {base}): on a "
            "fine-tune it usually works, but nobody has measured it there. The same weights in another precision "
            "count as another model, too"
        )
    there = {lora["digest"]: lora["strength"] for lora in loras}
    for lora in json.loads(described.get("below", "[]")):
        made = f"this student was made above the LoRA {name_of(lora)}"
        if there and not comparable:
            continue  # one of them may be it
        if lora["digest"] not in there:
            notes.append(
                f"{made}, which the model does not have: load that one before it, or save the student as one file "
                "(merge_upstream of Save Turbo LoRA, or the command `merge`)"
            )
        elif abs(there[lora["digest"]] - lora["strength"]) > 1e-6:
            notes.append(f"{made}; here that LoRA has strength {there[lora['digest']]:g}")
    return notes
