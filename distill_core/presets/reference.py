"""The evidence for a preset's levels: its maker's scheduler, run with what the maker's code gives it.

What a scheduler is given and what the network sees are two things: FLUX.2 dev Turbo's card lists levels that diffusers
shifts afterwards. So no list is taken from a card as it stands; the scheduler class is run and its result compared.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .levels import DEFAULT_SIZE, flux2_mu, flux_mu, preset_sigmas, tokens_of
from .table import Preset

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # its scheduler_config
HOST = "ComfyUI"  # the "scheduler" of rows whose source is one of its templates; tests/host run its own code


def reference_sigmas(preset: Preset, steps: int, width: int = DEFAULT_SIZE, height: int = DEFAULT_SIZE) -> Tensor:
    """The levels that the network sees when the maker's scheduler runs: [steps + 1], ending in 0.

    ``preset.reference`` holds scheduler (a class of diffusers), config, and what ``set_timesteps`` is given: "steps"
    (their number), "steps + 1" (makers who count N + 1 for N calls of the network), "linear" (N numbers from 1 to
    1 / N), "timesteps" or "sigmas" (lists), and "mu" (a number, or "flux" or "flux2" for the pipelines' formulas).
    Raises ValueError for a row whose reference is ComfyUI or that has none; ImportError without diffusers.
    """
    if preset.reference is None or preset.reference["scheduler"] == HOST:
        raise ValueError(f"{preset.key} has no reference scheduler in diffusers")
    import diffusers  # slow to import, and not needed for sampling

    said = preset.reference
    cls = getattr(diffusers, said["scheduler"])
    flow = "alphas_cumprod" not in vars(cls(**said.get("config", {})))
    scheduler = cls(**({} if flow else STABLE_DIFFUSION) | said.get("config", {}))
    options: dict[str, Any] = dict(said.get("options", {}).get(str(steps), said.get("options", {}).get("all", {})))
    if "mu" in said:
        options["mu"] = _mu(said, steps, tokens_of(width, height))
    given = said["given"]
    if given == "linear":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)
    elif given in ("timesteps", "sigmas"):
        scheduler.set_timesteps(**{given: said[given]}, **options)
    elif given == "steps + 1":
        scheduler.sigma_min = 0.0  # as the pipelines of these models set it
        scheduler.set_timesteps(steps + 1, **options)
    else:
        scheduler.set_timesteps(steps, **options)
    return _levels(scheduler, flow)


def _mu(said: dict, steps: int, tokens: int) -> float:
    config, mu = said.get("config", {}), said["mu"]
    if mu == "flux":
        line = (config.get("base_shift", 0.5), config.get("max_shift", 1.15), config.get("max_image_seq_len", 4096))
        return flux_mu(tokens, *line)
    return flux2_mu(tokens, steps) if mu == "flux2" else float(mu)


def _levels(scheduler: Any, flow: bool) -> Tensor:
    if not flow:
        timesteps = torch.as_tensor(scheduler.timesteps).long().cpu()
        alphas = scheduler.alphas_cumprod[timesteps].double()
        return torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1)]).float()
    if type(scheduler).__name__ == "SCMScheduler":  # angles of TrigFlow
        angles = scheduler.timesteps.double()
        return (angles.sin() / (angles.sin() + angles.cos())).clamp(max=1).float()
    levels = scheduler.sigmas.double().cpu().tolist()
    while len(levels) > 1 and levels[-2] == 0:  # a step from 0 to 0 is none
        levels.pop()
    return torch.tensor(levels)


def disagreement(preset: Preset, steps: int) -> float:
    """The largest difference of the preset's levels from its reference's, in flow time; inf if the counts differ."""
    ours, theirs = preset_sigmas(preset, steps), reference_sigmas(preset, steps)
    if len(ours) != len(theirs):
        return math.inf
    if ours.max() > 1.001 or preset.grid["kind"] == "timesteps":
        ours, theirs = ours / (1 + ours), theirs / (1 + theirs)
    return (ours - theirs).abs().max().item()


def unsupported(preset: Preset) -> list[str]:
    """What a row lacks as evidence, in words: a reference that was run, a second source, the author's own word."""
    lacks = []
    if not preset.second:
        lacks.append("no second source")
    if preset.confidence != "A":
        lacks.append("not read at the author's")
    if preset.known and preset.reference is None:
        lacks.append("no reference scheduler")
    if not preset.known:
        lacks.append("levels not known")
    return lacks
