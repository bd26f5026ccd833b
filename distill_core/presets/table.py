"""The table of turbo models: which noise levels, guidance and sampler each was made for, and who says so.

The rows are data (``presets.json``). A row states where its numbers come from and, where the numbers follow from a
rule (a shift, trailing timesteps, ...), that rule, from which `preset_sigmas` computes the list for any allowed number
of steps. ``listed`` keeps the published numbers; the tests hold the rules to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.process import DiscreteProcess, TimestepProcess, cumulative_alphas
from ..diffusion.schedules import (
    explicit_sigmas,
    lcm_timesteps,
    shift_sigmas,
    shifted_sigmas,
    sigmas_at_timesteps,
    trailing_timesteps,
    trigflow_sigmas,
    turbo_timesteps,
)

TABLE = Path(__file__).parent / "table.json"
TIMESTEP_RULES = {"turbo": turbo_timesteps, "trailing": trailing_timesteps, "lcm": lcm_timesteps}
DEFAULT_SIZE = 1024  # pixels; used where a grid depends on the picture's size and none is given
FLUX2_JUMP = 4300  # tokens (16 x 16 pixels each) above which FLUX.2's shift formula changes branch


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    key: its stable name.  families: architectures it belongs to.  steps: allowed counts.  cfg: classifier-free guidance
    scale, ``cfg_by_steps`` overrides it, ``cfg_max`` is the largest one stated anywhere.  sampler: one of
    ``samplers.SAMPLERS`` or None where the model needs a sampler of its own.  grid: the rule of its noise levels.
    confidence: A = the author's repository or card, or code, was read; B = second hand.
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
    cfg_by_steps: dict[str, float] = field(default_factory=dict)
    eta: float | None = None
    steps_of_file: bool = False  # the file is made for exactly one of ``steps``
    prediction: str | None = None  # where it is not the family's
    lora_strength: float | None = None
    guidance: float | None = None  # embedded guidance, an input of the network, not cfg
    video: bool = False

    @property
    def sampler_options(self) -> dict[str, float]:
        return {} if self.eta is None else {"eta": self.eta}

    def cfg_at(self, steps: int) -> float:
        return self.cfg_by_steps.get(str(steps), self.cfg)

    def check_steps(self, steps: int) -> None:
        """Raises ValueError when the model was not made for this many steps."""
        if steps not in self.steps:
            raise ValueError(f"{self.title} was made for {spell(self.steps)} steps, not {steps}; choose one of these")


@cache
def presets() -> dict[str, Preset]:
    """All rows by key, in the order of the file."""
    rows = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8")):
        row.pop("stated")  # the source's own words, kept in the file as evidence
        lists = {name: tuple(row[name]) for name in ("families", "steps", "auto") if name in row}
        listed = tuple(tuple(levels) for levels in row.get("listed", ()))
        rows[row["key"]] = Preset(**{**row, **lists, "listed": listed})
    return rows


def find_preset(key: str) -> Preset:
    """The row named ``key``. Raises ValueError with the known names."""
    try:
        return presets()[key]
    except KeyError:
        raise ValueError(f"there is no preset {key!r}; known: {', '.join(presets())}") from None


def presets_of(family: str) -> list[Preset]:
    """All rows of an architecture."""
    return [preset for preset in presets().values() if family in preset.families]


def auto_preset(family: str, steps: int | None = None) -> Preset:
    """The row that a family alone decides.

    With ``steps``, a row of the same noise levels made for that count is preferred (Qwen-Image-Lightning 4 and 8).
    Raises ValueError where the family has none, or several between which only the file's origin decides.
    """
    rows = presets_of(family)
    chosen = [preset for preset in rows if family in preset.auto]
    if not chosen:
        known = ", ".join(preset.key for preset in rows)
        hint = f"choose the one your file was made with: {known}" if known else "connect SIGMAS instead"
        raise ValueError(f"a model of family {family!r} alone does not tell how it was distilled; {hint}")
    first = chosen[0]
    if steps is not None and steps not in first.steps:
        same_rule = [preset for preset in rows if preset.grid == first.grid and steps in preset.steps]
        first = same_rule[0] if same_rule else first
    return first


def spell(numbers: Sequence[int]) -> str:
    """(1, 2, 3, 4) -> "1-4", (4, 8) -> "4 or 8"."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return " or ".join(map(str, numbers))


def preset_sigmas(
    preset: Preset,
    steps: int | None = None,
    process: TimestepProcess | None = None,
    width: int = DEFAULT_SIZE,
    height: int = DEFAULT_SIZE,
) -> Tensor:
    """The noise levels of a preset: [steps + 1], falling, ending in 0.

    process: gives the sigma of a timestep (``DiscreteProcess`` or ComfyUI's ``model_sampling``); by default Stable
    Diffusion's table.  width, height: of the picture in pixels, where the levels depend on it (FLUX).
    Raises ValueError for a step count that the model was not made for and for models whose levels are not known.
    """
    steps = preset.default_steps if steps is None else steps
    preset.check_steps(steps)
    tokens = tokens_of(width, height)
    return GRIDS[preset.grid["kind"]](preset, steps, process, tokens)


def _timesteps(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    rule = preset.grid.get("rule")
    timesteps = TIMESTEP_RULES[rule](steps) if rule else preset.grid["list"]
    return sigmas_at_timesteps(process or DiscreteProcess(cumulative_alphas()), timesteps)


def _shifted(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return shifted_sigmas(steps, shift_alpha=preset.grid.get("alpha"), shift_mu=preset.grid.get("mu"))


def _normal(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    grid = preset.grid
    alpha = grid["alpha_by_steps"][str(steps)] if "alpha_by_steps" in grid else grid["alpha"]
    return twice_shifted_sigmas(steps, alpha)


def _flux(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return shifted_sigmas(steps, shift_mu=flux_mu(tokens))


def _flux2(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return shifted_sigmas(steps, shift_mu=flux2_mu(tokens, steps))


def _explicit(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return explicit_sigmas(preset.grid["sigmas"])


def _trigflow(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return trigflow_sigmas(steps)


def _unlisted(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    raise ValueError(f"{preset.title}: {preset.grid['why']}")


GRIDS: dict[str, Callable[[Preset, int, TimestepProcess | None, int], Tensor]] = {
    "timesteps": _timesteps,
    "shifted": _shifted,
    "normal": _normal,
    "flux": _flux,
    "flux2": _flux2,
    "explicit": _explicit,
    "trigflow": _trigflow,
    "unlisted": _unlisted,
}


def twice_shifted_sigmas(steps: int, alpha: float, train_steps: int = 1000) -> Tensor:
    """Evenly spaced between the ends of an already shifted table, then shifted again: Stability's sd3_infer.py,
    diffusers' FlowMatchEuler and ComfyUI's scheduler ``normal``. The last step is almost null."""
    lowest = shift_sigmas(torch.tensor(1 / train_steps), shift_alpha=alpha).item()
    return explicit_sigmas(shift_sigmas(torch.linspace(1, lowest, steps), shift_alpha=alpha).tolist())


def tokens_of(width: int, height: int) -> int:
    """The number of tokens that a FLUX model cuts a picture of width x height pixels into, 16 x 16 pixels each."""
    return round(width * height / 256)


def flux_mu(tokens: int) -> float:
    """FLUX.1 dev's shift: a line through 0.5 at 256 tokens and 1.15 at 4096 (black-forest-labs/flux, sampling.py)."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's shift from the token count: interpolated between a line for 10 and a line for 200 steps, but above
    `FLUX2_JUMP` tokens the line for 200 steps whatever ``steps`` is, hence a jump (black-forest-labs/flux2)."""
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    at_200 = 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > FLUX2_JUMP else at_10 + (at_200 - at_10) * (steps - 10) / 190


def steady_flux2_mu(tokens: int, steps: int) -> float:
    """`flux2_mu` without its jump: above `FLUX2_JUMP` tokens the value it has there (our choice, from no source)."""
    return flux2_mu(min(tokens, FLUX2_JUMP), steps)


def explain(preset: Preset, steps: int, sigmas: Tensor) -> str:
    """A readable account of a preset and the levels made from it, with its source."""
    levels = ", ".join(f"{level:.4g}" for level in sigmas.tolist())
    lines = [
        f"{preset.title}  [{preset.key}]",
        f"{len(sigmas) - 1} steps: {levels}",
        f"sampler {preset.sampler or 'of its own'}"
        + (f", eta {preset.eta:g}" if preset.eta is not None else "")
        + f"; cfg {preset.cfg_at(steps):g}"
        + (f" (up to {preset.cfg_max:g} is in use)" if preset.cfg_max > preset.cfg_at(steps) else ""),
    ]
    if preset.steps_of_file:
        lines.append(f"The file must be the one made for {steps} steps.")
    if preset.lora_strength is not None:
        lines.append(f"LoRA strength {preset.lora_strength:g}.")
    if preset.guidance is not None:
        lines.append(f"Embedded guidance {preset.guidance:g} (an input of the network, not cfg).")
    if preset.prediction is not None:
        lines.append(f"The network predicts {preset.prediction}: {preset.comfy}.")
    if preset.note:
        lines.append(f"Note: {preset.note}")
    trust = "read at the source" if preset.confidence == "A" else "second hand"
    return "\n".join([*lines, f"Source ({trust}): {preset.source}"])
