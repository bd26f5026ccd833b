"""The noise levels of a preset, computed from its rule: one function a rule, for whole lists and for their ends."""

from __future__ import annotations

import math
from collections.abc import Callable

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
from .table import Preset

TIMESTEP_RULES = {"turbo": turbo_timesteps, "trailing": trailing_timesteps, "lcm": lcm_timesteps}
DEFAULT_SIZE = 1024  # pixels; used where a grid depends on the picture's size and none is given
MOST_TOKENS = 65536  # 4096 x 4096 pixels; for pictures much larger the rules of FLUX make all levels 1
FLUX2_JUMP = 4300  # tokens (16 x 16 pixels each) above which FLUX.2's shift formula changes branch


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
    return GRIDS[preset.grid["kind"]](preset, steps, process, tokens_of(width, height))


def shift_alpha_of(preset: Preset, steps: int, tokens: int) -> float | None:
    """The factor that shifts evenly spaced levels into the preset's; None where its rule is another one."""
    grid = preset.grid
    if grid["kind"] == "shifted":
        return grid["alpha"] if "alpha" in grid else math.exp(grid["mu"])
    if grid["kind"] == "flux":
        return math.exp(_flux_mu_of(grid, tokens))
    return math.exp(flux2_mu(tokens, steps)) if grid["kind"] == "flux2" else None


def end_of_rule(preset: Preset, first: float, steps: int, process: TimestepProcess | None, tokens: int):
    """The levels of a longer list of the same rule from level ``first`` on, in ``steps`` steps: [steps + 1].

    It is what a scheduler gives at denoise below 1, where it makes a longer list and keeps its end. None where the
    rule does not say (lists that were published as numbers).
    """
    kind, left = preset.grid["kind"], torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    alpha = shift_alpha_of(preset, steps, tokens)
    if alpha is not None:
        start = first / (alpha - (alpha - 1) * first)
        return _closed(shift_sigmas(start * left, shift_alpha=alpha))
    if kind == "normal":
        alpha = _normal_alpha(preset, steps)
        start = first / (alpha - (alpha - 1) * first)
        lowest = shift_sigmas(torch.tensor(1e-3, dtype=torch.float64), shift_alpha=alpha).item()
        if start <= lowest:
            return None
        return _closed(shift_sigmas(torch.linspace(start, lowest, steps, dtype=torch.float64), shift_alpha=alpha))
    if kind == "logsnr":
        low, high = preset.grid["min"], preset.grid["max"]
        start = (high + math.log(first / (1 - first))) / (high - low) if first < 1 else 1.0
        levels = torch.sigmoid(-(high - start * left * (high - low)))
        return _closed(torch.cat([torch.tensor([first]).double(), levels[1:]]))
    if kind == "timesteps" and "rule" in preset.grid and process is not None:
        start = float(process.timestep(torch.tensor(first)))
        turbo = preset.grid["rule"] == "turbo"
        timesteps = start - 100 * torch.arange(steps) if turbo else (start + 1) * left - 1
        return _closed(process.sigma(timesteps.float())) if timesteps[-1] >= 0 else None
    return None


def _closed(levels: Tensor) -> Tensor:
    return torch.cat([levels.float(), torch.zeros(1)])


def _timesteps(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    rule = preset.grid.get("rule")
    timesteps = TIMESTEP_RULES[rule](steps) if rule else preset.grid["list"]
    return sigmas_at_timesteps(process or DiscreteProcess(cumulative_alphas()), timesteps)


def _shifted(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    alpha = shift_alpha_of(preset, steps, tokens)
    levels = shifted_sigmas(steps, shift_alpha=alpha)
    if not (levels[1:] < levels[:-1]).all():
        raise ValueError(
            f"{preset.title}: its rule shifts the levels of a picture of {tokens} tokens (16 x 16 pixels each) by "
            f"{alpha:.3g}, which makes all of them 1; make the picture smaller, or connect SIGMAS"
        )
    return levels


def _normal_alpha(preset: Preset, steps: int) -> float:
    if "alpha" in preset.grid:
        return preset.grid["alpha"]
    by_steps = preset.grid["alpha_by_steps"]
    return by_steps.get(str(steps), by_steps[str(preset.default_steps)])


def _normal(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return twice_shifted_sigmas(steps, _normal_alpha(preset, steps))


def _explicit(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return explicit_sigmas(preset.grid["sigmas"])


def _trigflow(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    return trigflow_sigmas(steps)


def _logsnr(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    """Evenly spaced in the logarithm of the signal-to-noise ratio, the first level raised to 1 (Stable Audio 3)."""
    ratios = torch.linspace(preset.grid["min"], preset.grid["max"], steps + 1)[1:-1]
    return explicit_sigmas([1.0, *torch.sigmoid(-ratios).tolist()])


def _piflow(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    """Evenly spaced but for the last step, which is ``last`` of the others, then shifted (pi-Flow's scheduler)."""
    left = torch.arange(steps - 1, -1, -1) + preset.grid["last"]
    return explicit_sigmas(shift_sigmas(left / left[0], shift_alpha=preset.grid["alpha"]).tolist())


def _unlisted(preset: Preset, steps: int, process: TimestepProcess | None, tokens: int) -> Tensor:
    raise ValueError(f"{preset.title}: {preset.grid['why']}")


GRIDS: dict[str, Callable[[Preset, int, TimestepProcess | None, int], Tensor]] = {
    "timesteps": _timesteps,
    "shifted": _shifted,
    "flux": _shifted,
    "flux2": _shifted,
    "normal": _normal,
    "explicit": _explicit,
    "trigflow": _trigflow,
    "logsnr": _logsnr,
    "piflow": _piflow,
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


def flux_mu(tokens: int, base: float = 0.5, most: float = 1.15, most_tokens: int = 4096) -> float:
    """A shift that grows with the picture: a line through ``base`` at 256 tokens and ``most`` at ``most_tokens``.

    The defaults are FLUX.1 dev's (black-forest-labs/flux, sampling.py); Qwen-Image's are 0.5, 0.9 and 8192.
    """
    return base + (tokens - 256) * (most - base) / (most_tokens - 256)


def _flux_mu_of(grid: dict, tokens: int) -> float:
    return flux_mu(tokens, **{name: grid[name] for name in ("base", "most", "most_tokens") if name in grid})


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's shift from the token count: interpolated between a line for 10 and a line for 200 steps, but above
    `FLUX2_JUMP` tokens the line for 200 steps whatever ``steps`` is, hence a jump (black-forest-labs/flux2)."""
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    at_200 = 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > FLUX2_JUMP else at_10 + (at_200 - at_10) * (steps - 10) / 190


def steady_flux2_mu(tokens: int, steps: int) -> float:
    """`flux2_mu` without its jump: above `FLUX2_JUMP` tokens the value it has there (our choice, from no source)."""
    return flux2_mu(min(tokens, FLUX2_JUMP), steps)
