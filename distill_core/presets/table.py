"""The table of turbo models: what each was made for, and who says so.

The rows are data (``table.json``). A row states where its numbers come from, the rule of its noise levels
(`levels.preset_sigmas` computes the list), the scheduler that gives its maker's levels (`reference.py` runs it), and
how sure we are. ``listed`` keeps the published numbers; the tests hold the rules to them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent / "table.json"


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    key: its stable name.  families: architectures it belongs to.  steps: the counts it was made for; other_steps:
    counts that follow the same rule and are in use, though it was not made for them.  cfg: classifier-free guidance
    scale, ``cfg_by_steps`` overrides it, ``cfg_max`` is the largest one stated anywhere.  sampler: one of
    ``samplers.SAMPLERS`` or None where the model needs a sampler of its own.  grid: the rule of its noise levels, as
    the network sees them.  reference: the scheduler that makes the maker's levels, with what the maker's code gives it
    (`reference.reference_sigmas`).  ksampler: scheduler and shift that give the levels in ComfyUI's KSampler, None
    where none does.  confidence: A = the author's repository or card, or code, was read; B = second hand.  second: a
    source that says the same, independently.  checked: the day on which it was last compared with its reference.
    """

    key: str
    title: str
    families: tuple[str, ...]
    steps: tuple[int, ...]
    default_steps: int
    cfg: float
    cfg_max: float
    sampler: str | None
    grid: dict
    comfy: str
    source: str
    confidence: str
    note: str
    listed: tuple[tuple[float, ...], ...] = ()
    auto: tuple[str, ...] = ()  # families for which it is what "auto" means
    other_steps: tuple[int, ...] = ()
    cfg_by_steps: dict[str, float] = field(default_factory=dict)
    eta: float | None = None
    steps_of_file: bool = False  # the file is made for exactly one of ``steps``
    prediction: str | None = None  # where it is not the family's
    prediction_too: str | None = None  # another one that its authors use as well
    lora: bool = False  # it is a LoRA, not a model of its own
    lora_strength: float | None = None  # where it is not 1
    guidance: float | None = None  # embedded guidance, an input of the network, not cfg
    guidance_input: bool | None = None  # whether its network has that input, where this tells models of a family apart
    noise_scale: float | None = None  # of the model's sampling, where it is not the family's
    audio_shift: float | None = None  # the shift factor of the sound in models that make both
    part: str = ""  # what the list is for, where it does not start from pure noise
    video: bool = False
    reference: dict | None = None
    ksampler: dict | None = None
    second: str = ""
    checked: str = ""

    @property
    def sampler_options(self) -> dict[str, float]:
        return {} if self.eta is None else {"eta": self.eta}

    @property
    def known(self) -> bool:
        """Whether its noise levels are."""
        return self.grid["kind"] != "unlisted"

    @property
    def all_steps(self) -> tuple[int, ...]:
        return (*self.steps, *self.other_steps)

    def cfg_at(self, steps: int) -> float:
        return self.cfg_by_steps.get(str(steps), self.cfg)

    def check_steps(self, steps: int) -> None:
        """Raises ValueError when the model was not made for this many steps and they are not in use either."""
        if steps not in self.all_steps:
            raise ValueError(f"{self.title} was made for {spell(self.steps)} steps, not {steps}; choose one of these")


@cache
def presets() -> dict[str, Preset]:
    """All rows by key, in the order of the file."""
    rows = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8")):
        row.pop("stated")  # the source's own words, kept in the file as evidence
        lists = {name: tuple(row[name]) for name in ("families", "steps", "other_steps", "auto") if name in row}
        listed = tuple(tuple(levels) for levels in row.get("listed", ()))
        rows[row["key"]] = Preset(**{**row, **lists, "listed": listed})
    return rows


def find_preset(key: str) -> Preset:
    """The row named ``key``. Raises ValueError with the known names."""
    try:
        return presets()[key]
    except KeyError:
        raise ValueError(f"there is no preset {key!r}; known: {', '.join(presets())}") from None


def presets_of(family: str | None, guidance_embedded: bool | None = None) -> list[Preset]:
    """All rows of an architecture.

    guidance_embedded: whether the network has guidance as an input, where that is known: rows for the other kind are
    left out (FLUX.2 klein has none, FLUX.2 dev has).
    """
    rows = [preset for preset in presets().values() if family in preset.families]
    if guidance_embedded is None:
        return rows
    return [preset for preset in rows if preset.guidance_input in (None, guidance_embedded)]


def auto_preset(family: str, steps: int | None = None, guidance_embedded: bool | None = None) -> Preset:
    """The row that a family alone decides.

    Where its own row was not made for ``steps``, another row of the family that was, by the same rule, takes its place.
    Raises ValueError where the family has none, or several between which only the file's origin decides.
    """
    rows = presets_of(family, guidance_embedded)
    chosen = [preset for preset in rows if family in preset.auto]
    if not chosen:
        known = ", ".join(preset.key for preset in rows)
        hint = f"choose the one your file was made with: {known}" if known else "connect SIGMAS instead"
        raise ValueError(f"a model of family {family!r} alone does not tell how it was distilled; {hint}")
    first = chosen[0]
    if steps is None or steps in first.steps:
        return first
    made_for = [preset for preset in rows if preset.grid == first.grid and steps in preset.steps]
    return first if steps in first.other_steps else (made_for or [first])[0]


def spell(numbers: Sequence[int]) -> str:
    """(1, 2, 3, 4) -> "1-4", (4, 8) -> "4 or 8"."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return " or ".join(map(str, numbers))


def counted(steps: int) -> str:
    """1 -> "1 step", 4 -> "4 steps"."""
    return f"{steps} step{'s' * (steps != 1)}"
