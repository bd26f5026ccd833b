"""What the Schedule Doctor would warn of on a sampler's node, examined once for the same model and choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from ...distill_core.presets.doctor import diagnose
from ...distill_core.presets.facts import SamplingFacts
from ...distill_core.presets.recipe import AUTO, describe_metadata

# Faults that do not depend on which distillation this is.
OF_ANY_MODEL = frozenset(
    ("unusable", "other_kind", "time_scale", "prediction", "extra_shift_node", "audio_shift", "noise_scale")
    + ("two_turbo_loras", "other_family", "lora_not_on", "lora_strength")
)


@dataclass(frozen=True)
class _Asked:
    """patches, sampling: what tells two states of a MODEL apart, the id of its patches and its ``model_sampling``."""

    patches: Any
    sampling: Any
    sigmas: tuple[float, ...]
    cfg: float
    preset: str
    size: tuple[int, int]
    guidance: float | None
    own_levels: bool
    facts: SamplingFacts = field(compare=False)


def warnings_of(
    model,
    facts: SamplingFacts,
    sigmas: Tensor,
    cfg: float,
    preset: str,
    size: tuple[int, int],
    guidance=None,
    own_levels: bool = False,
) -> list[str]:
    """Errors and warnings of the Schedule Doctor, a line each. size: height and width in pixels.

    own_levels: the user chose the levels. Where nothing says which distillation the model is, it may be a teacher, and
    neither steps nor cfg can be wrong.
    """
    own_levels = own_levels and preset == AUTO and not facts.loras and not describe_metadata(facts.metadata)
    sampling = model.get_model_object("model_sampling")
    levels = tuple(sigmas.tolist())
    return list(_examined(_Asked(model.patches_uuid, sampling, levels, cfg, preset, size, guidance, own_levels, facts)))


@lru_cache(maxsize=32)
def _examined(asked: _Asked) -> tuple[str, ...]:
    sigmas, (height, width) = Tensor(asked.sigmas), asked.size
    found = diagnose(asked.facts, sigmas, asked.cfg, asked.preset, width, height, asked.guidance)
    kept = [f for f in found.findings if f.fault in OF_ANY_MODEL or not asked.own_levels]
    return tuple(f"{f.severity.upper()}: {f.what}. {f.fix}" for f in kept if f.severity != "note")
