"""What is wrong with a turbo model's noise levels, and the cure.

Two things are compared, never bare numbers of nodes: the list of noise levels with the one the model was trained on
or a part of it (`parts.py`; as flow time, so that 0.02 means the same for every kind of model), and what the network is
told about each level with what it was trained to be told. The causes are then recognised by what a mistake makes of the
list: a shift of mu typed as alpha gives the list of alpha = mu, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from ..diffusion.process import TimestepProcess
from ..diffusion.schedules import check_sigmas, shifted_sigmas
from ..lora_files import parse_description
from . import checks, model_checks
from .checks import SEVERITIES, Case, Finding, fitted_alpha, flux2_tokens
from .explain import explain
from .facts import SamplingFacts
from .levels import MOST_TOKENS, preset_sigmas, steady_flux2_mu, tokens_of
from .parts import Part, find_end_of_rule, find_part, nearest_part
from .recipe import AUTO, choose_row, own_description, rival_loras, shift_of, student_levels
from .table import Preset, presets_of

CHECKS = (
    checks.check_kind,
    checks.check_open_end,
    model_checks.check_rivals,
    model_checks.check_lora,
    model_checks.check_family,
    model_checks.check_time_scale,
    model_checks.check_prediction,
    checks.check_steps,
    checks.check_which_file,
    checks.check_flux2_jump,
    checks.check_list,
    model_checks.check_shift_node,
    model_checks.check_audio_shift,
    model_checks.check_noise_scale,
    model_checks.check_guidance,
    model_checks.check_cfg,
)
RESTORES = {"time_scale", "extra_shift_node", "shift_unit", "shift_twice", "prediction", "audio_shift"}
SIZES = range(64, 16385, 256)  # tokens, up to 2048 x 2048 pixels: tried where the picture's size is not known


@dataclass(frozen=True)
class Diagnosis:
    """findings, the text of the report, the trained levels within the ends of the given list (the given ones where none
    are known), what the list was recognised as, and whether and with which shifts the model's native sampling has to be
    restored."""

    findings: list[Finding]
    report: str
    sigmas: Tensor
    part: Part | None = None
    restore_model: bool = False
    shift_alpha: float | None = None
    audio_shift: float | None = None


def diagnose(
    facts: SamplingFacts,
    sigmas: Tensor,
    cfg: float,
    preset: str = AUTO,
    width: int | None = None,
    height: int | None = None,
    guidance: float | None = None,
) -> Diagnosis:
    """Examine a model, a list of levels and a cfg scale.

    preset: a key of the table or "auto" (the file's metadata, or the row of the family whose list this is).
    width, height: of the picture in pixels, where the levels depend on it (FLUX), None when not known.
    guidance: embedded guidance in the conditioning, None when not known.
    Raises ValueError for an unknown preset or one of another family.
    """
    try:
        check_sigmas(sigmas, closed=False)
    except ValueError as error:
        finding = Finding("unusable", "error", str(error), "connect the SIGMAS output of Turbo Preset")
        return Diagnosis([finding], _spell_finding(finding), sigmas)
    sigmas = sigmas.float()
    tokens = min(tokens_of(width, height), MOST_TOKENS) if width and height else None
    case = _compare(facts, sigmas, cfg, preset, tokens, guidance)
    findings = [finding for check in CHECKS for finding in check(case)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    faults = {finding.fault for finding in findings}
    row, trained = case.preset, case.trained
    alpha = fitted_alpha(trained) if trained is not None and facts.table is None else None
    return Diagnosis(
        findings,
        _report(findings, case),
        _mended(case, "flux2_jump" in faults),
        case.part,
        bool(faults & RESTORES) and facts.patched,
        alpha,
        row.audio_shift if row is not None else None,
    )


def _compare(
    facts: SamplingFacts, sigmas: Tensor, cfg: float, preset: str, tokens: int | None, guidance: float | None
) -> Case:
    """Find the row whose list this is, else the one to compare with."""
    case = Case(facts, None, sigmas, None, cfg, tokens, guidance=guidance)
    described, file = own_description(facts) if preset == AUTO and not rival_loras(facts) else ({}, "")
    if "sigmas" in described:
        try:
            return _compare_with_file(case, parse_description(described))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; choose a preset, or train the LoRA again") from error
    if preset == AUTO:
        rows = presets_of(facts.family, facts.guidance_embedded)
        usual = next((row for row in rows if facts.family in row.auto), None)
    else:
        usual, rows = None, [choose_row(facts, preset, None)]
    rows = [row for row in rows if row.known]
    found = [(row, match) for row in rows for match in [_match(case, row)] if match is not None]
    # Rows that this cfg fits first, of these the family's own, then whole lists before parts.
    found.sort(key=lambda pair: (not _takes(pair[0], cfg), pair[0] != usual, not pair[1][0].whole))
    if found:
        best, (part, trained) = found[0]
        rivals = [other for other, _ in found[1:]]
        return Case(facts, best, sigmas, trained, cfg, tokens, part, guidance, usual, rivals)
    row = usual if preset == AUTO else (rows or [choose_row(facts, preset, None)])[0]
    if row is None or not row.known:
        return Case(facts, row, sigmas, None, cfg, tokens, guidance=guidance)
    count = min(row.steps, key=lambda allowed: (abs(allowed - case.steps), allowed))
    plain = preset == AUTO and row.lora and facts.strengths == ()
    return Case(facts, row, sigmas, _levels(case, row, count), cfg, tokens, None, guidance, usual, plain=plain)


def _takes(row: Preset, cfg: float) -> bool:
    scales = (row.cfg, row.cfg_max, *row.cfg_by_steps.values())
    return min(scales) - 1e-3 <= cfg <= max(scales) + 1e-3


def _compare_with_file(case: Case, description: dict[str, Any]) -> Case:
    levels, shift = description["sigmas"], shift_of(description, 16, 16 * (case.tokens or 0))
    lists = [student_levels(levels, count, shift) for count in range(len(levels), 0, -1)]
    parts = [(find_part(case.sigmas, trained, case.facts.table), trained) for trained in lists]
    found = [(part, trained) for part, trained in parts if part is not None]
    if found:  # a whole list, else the nearest, of equally near ones the longest
        off = lambda match: (not match[0].whole, case.distance(case.sigmas, match[0].levels))  # noqa: E731
        part, trained = min(found, key=off)
    else:
        part, trained = None, next((known for known in lists if len(known) - 1 == case.steps), lists[0])
    return replace(case, trained=trained, part=part)


def _match(case: Case, row: Preset) -> tuple[Part, Tensor] | None:
    """The list as one of the row's, as a part of one, or as the end of a longer one, whichever is nearer; and the
    whole list."""
    part = next(_parts(case, row), None)
    if part is not None and part[0].whole:
        return part
    both = [match for match in (part, next(_ends(case, row), None)) if match is not None]
    return min(both, key=lambda match: case.distance(case.sigmas, match[0].levels), default=None)


def _parts(case: Case, row: Preset) -> Iterator[tuple[Part, Tensor]]:
    counts = sorted(row.all_steps, key=lambda n: (n != case.steps, n not in row.steps, n != row.default_steps))
    for trained in (trained for count in counts for trained in _possible(case, row, count)):
        part = find_part(case.sigmas, trained, case.facts.table)
        if part is not None:
            yield part, trained


def _ends(case: Case, row: Preset) -> Iterator[tuple[Part, Tensor]]:
    table = case.facts.table
    process = cast(TimestepProcess, case.facts.process) if table is not None else None
    trained = _levels(case, row, row.default_steps)
    for tokens in _sizes(case, row):
        end = find_end_of_rule(case.sigmas, row, trained, process, tokens, table)
        if end is not None:
            yield end, trained


def _sizes(case: Case, row: Preset) -> Sequence[int]:
    """Token counts that the list may be for: the given one, else usual ones where the row's levels depend on it."""
    sized = row.grid["kind"] in ("flux", "flux2")
    return [case.tokens] if case.tokens else SIZES if sized else [4096]


def _possible(case: Case, row: Preset, steps: int) -> Iterator[Tensor]:
    """The row's lists for a step count: one, or as many as sizes it may be for."""
    yield _levels(case, row, steps)
    if row.grid["kind"] in ("flux", "flux2"):
        for tokens in _sizes(case, row):
            yield _made_for(case, row, steps, tokens)


def _levels(case: Case, row: Preset, steps: int) -> Tensor:
    if row.grid["kind"] == "flux2":
        tokens = case.tokens or flux2_tokens(case.sigmas)
        return shifted_sigmas(steps, shift_mu=steady_flux2_mu(tokens, steps))
    return _made_for(case, row, steps, case.tokens or 4096)


def _made_for(case: Case, row: Preset, steps: int, tokens: int) -> Tensor:
    process = cast(TimestepProcess, case.facts.process) if row.grid["kind"] == "timesteps" else None
    return preset_sigmas(row, steps, process, 16 * tokens, 16)  # as many tokens as the picture has


def _mended(case: Case, at_jump: bool) -> Tensor:
    """The trained levels between the ends of the given list, which stays what it is where nothing is known."""
    if case.trained is None or case.plain:
        return case.sigmas
    if at_jump and case.preset is not None:
        return _levels(case, case.preset, len(case.trained) - 1)
    if case.part is not None:
        return case.part.levels
    return nearest_part(case.sigmas, case.trained, case.facts.table).to(case.sigmas.dtype)


def _spell_finding(finding: Finding) -> str:
    return f"{finding.severity.upper()} [{finding.fault}] {finding.what}.\n  Fix: {finding.fix}."


def _report(findings: list[Finding], case: Case) -> str:
    spell = lambda levels: ", ".join(f"{level:.4g}" for level in levels.tolist())  # noqa: E731
    lines = [_spell_finding(finding) for finding in findings]
    if not findings:
        lines.append("No fault found." if case.trained is not None else "Nothing to compare with.")
    lines.append(f"given:   {spell(case.sigmas)}")
    if case.trained is not None:
        lines.append(f"trained: {spell(case.trained)}")
    if case.part is not None and not case.part.whole:
        lines.append(f"recognised as {case.part.name}")
    if case.rivals:
        lines.append(f"also a list of: {', '.join(row.key for row in case.rivals)}")
    lines += [f"not examined: {what}" for what in model_checks.unknown(case)]
    if case.preset is not None and case.trained is not None:
        lines.append(f"compared with: {explain(case.preset, len(case.trained) - 1, case.trained)}")
    return "\n".join(lines)
