"""What is wrong with a turbo model's noise levels, and the cure.

Two things are compared, never bare numbers of nodes: the list of noise levels with the one the model was trained on
(as flow time, so that 0.02 means the same for every kind of model), and what the network is told about each level with
what it was trained to be told. The causes are then recognised by what a mistake makes of the list: a shift of mu typed
as alpha gives the list of alpha = mu, and so on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from torch import Tensor

from ..diffusion.schedules import check_sigmas, shifted_sigmas
from .checks import CHECKS, SAME, SEVERITIES, Case, Finding, SamplingFacts, fitted_alpha, flux2_tokens
from .recipe import AUTO, choose_row, describe_metadata, student_levels
from .table import Preset, explain, preset_sigmas, presets_of, steady_flux2_mu, tokens_of


@dataclass(frozen=True)
class Diagnosis:
    """findings, the text of the report, the trained levels (those given where none are known), and whether and with
    which shift the model's native sampling has to be restored."""

    findings: list[Finding]
    report: str
    sigmas: Tensor
    restore_model: bool = False
    shift_alpha: float | None = None


def diagnose(
    facts: SamplingFacts,
    sigmas: Tensor,
    cfg: float,
    preset: str = AUTO,
    width: int | None = None,
    height: int | None = None,
) -> Diagnosis:
    """Examine a model, a list of levels and a cfg scale.

    preset: a key of the table or "auto" (the file's metadata, the family, or the nearest list of that family).
    width, height: of the picture in pixels, where the levels depend on it (FLUX.2), None when not known.
    Raises ValueError for an unknown preset or one of another family.
    """
    try:
        check_sigmas(sigmas)
    except ValueError as error:
        finding = Finding("unusable", "error", str(error), "connect the SIGMAS output of Turbo Preset")
        return Diagnosis([finding], _report([finding], None, sigmas, None), sigmas)
    tokens = tokens_of(width, height) if width and height else None
    row, trained = _trained(facts, sigmas, preset, tokens)
    case = Case(facts, row, sigmas, trained, cfg, tokens)
    findings = [finding for check in CHECKS for finding in check(case)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    faults = {finding.fault for finding in findings}
    restore = bool(faults & {"time_scale", "extra_shift_node", "shift_unit", "shift_twice", "prediction"})
    alpha = fitted_alpha(trained) if trained is not None and facts.table is None else None
    repaired = sigmas if trained is None else trained
    report = _report(findings, row, sigmas, trained)
    return Diagnosis(findings, report, repaired, restore and facts.patched, alpha)


def _trained(facts: SamplingFacts, sigmas: Tensor, preset: str, tokens: int | None):
    """The row to compare with and its levels for as many steps as the list has, or for the nearest count it allows."""
    steps = len(sigmas) - 1
    described = describe_metadata(facts.metadata)
    if preset == AUTO and "sigmas" in described:
        levels = json.loads(described["sigmas"])
        return None, student_levels(levels, min(steps, len(levels)))
    row: Preset | None
    try:
        row = choose_row(facts, preset, steps)
    except ValueError:
        if preset != AUTO:
            raise
        row = _nearest(facts, sigmas)
    if row is None or row.grid["kind"] == "unlisted":
        return row, None
    count = min(row.steps, key=lambda allowed: (abs(allowed - steps), allowed))
    return row, _levels(facts, row, count, sigmas, tokens)


def _levels(facts, row: Preset, steps: int, sigmas: Tensor, tokens: int | None) -> Tensor:
    if row.grid["kind"] == "flux2":
        return shifted_sigmas(steps, shift_mu=steady_flux2_mu(tokens or flux2_tokens(sigmas), steps))
    process = facts.process if row.grid["kind"] == "timesteps" else None
    side = round((tokens or 4096) ** 0.5) * 16
    return preset_sigmas(row, steps, process, side, side)


def _nearest(facts: SamplingFacts, sigmas: Tensor) -> Preset | None:
    """The row of the family whose list this is, if there is one."""
    steps = len(sigmas) - 1
    case = Case(facts, None, sigmas, None, 1.0, None)
    for row in presets_of(facts.family or ""):
        if row.grid["kind"] != "unlisted" and steps in row.steps:
            if case.distance(sigmas, _levels(facts, row, steps, sigmas, None)) <= SAME:
                return row
    return None


def _report(findings: list[Finding], row: Preset | None, sigmas: Tensor, trained: Tensor | None) -> str:
    spell = lambda levels: ", ".join(f"{level:.4g}" for level in levels.tolist())  # noqa: E731
    lines = [f"{f.severity.upper()} [{f.fault}] {f.what}.\n  Fix: {f.fix}." for f in findings] or ["No fault found."]
    lines.append(f"given:   {spell(sigmas)}")
    if trained is None:
        lines.append("trained: not known; choose a preset to compare with one")
    else:
        lines.append(f"trained: {spell(trained)}")
    if row is not None and trained is not None:
        lines.append(f"compared with: {explain(row, len(trained) - 1, trained)}")
    return "\n".join(lines)
