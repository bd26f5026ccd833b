"""The faults that a turbo model's noise levels can have, each with how it is recognised and cured (doctor.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diffusion.schedules import shifted_sigmas
from .facts import SamplingFacts
from .levels import FLUX2_JUMP, flux2_mu, preset_sigmas, twice_shifted_sigmas
from .parts import Part, distance, is_whole, lies_above, starts_above
from .table import Preset, counted, spell

SEVERITIES = ("error", "warning", "note")  # the picture will be wrong / may be worse / good to know


@dataclass(frozen=True)
class Finding:
    """fault: a stable name.  severity: one of `SEVERITIES`.  what: in words, with numbers.  fix: what to do."""

    fault: str
    severity: str
    what: str
    fix: str


@dataclass(frozen=True)
class Case:
    """What the single checks look at.

    part: what the list was recognised as, None if it is no trained list and no part of one.  trained: the list that it
    is compared with, None where none is known.  usual: what "auto" means for the family.  rivals: other rows whose list
    it is, too.  plain: the model seems to be no turbo model at all, so that levels and cfg say nothing.
    """

    facts: SamplingFacts
    preset: Preset | None
    sigmas: Tensor
    trained: Tensor | None
    cfg: float
    tokens: int | None = None
    part: Part | None = None
    guidance: float | None = None
    usual: Preset | None = None
    rivals: list[Preset] = field(default_factory=list)
    plain: bool = False

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def whole(self) -> bool:
        return self.trained is not None and is_whole(self.sigmas, self.trained, self.facts.table)

    def distance(self, a: Tensor, b: Tensor) -> float:
        return distance(a, b, self.facts.table)


def fitted_alpha(sigmas: Tensor) -> float | None:
    """The shift factor whose evenly spaced list this is, or the end of a longer one, to 0.003; None if there is none.

    A list of one step is one of any shift, so it has none.
    """
    steps, inner = len(sigmas) - 1, sigmas[1:-1].double()
    if steps < 2 or sigmas[0] > 1.001 or sigmas[-1] != 0:
        return None
    whole = sigmas[0] >= 0.999
    for total in [steps] if whole else range(steps + 1, 8 * steps):
        even = torch.linspace(1, 0, total + 1, dtype=torch.float64)[total - steps :]
        alpha = (inner.logit() - even[1:-1].logit()).mean().exp().item()
        if (shifted_sigmas(total, shift_alpha=alpha)[total - steps :] - sigmas).abs().max() < 3e-3:
            return alpha
    return None


def flux2_tokens(sigmas: Tensor) -> int:
    """The token count that Flux2Scheduler made this list for; 4096 (1024 x 1024) where it is no such list."""
    alpha, steps = fitted_alpha(sigmas), len(sigmas) - 1
    if alpha is None:
        return 4096
    mu = math.log(alpha)
    if flux2_mu(256, steps) - 0.01 <= mu <= flux2_mu(FLUX2_JUMP, steps) + 0.01:
        return round((mu - flux2_mu(0, steps)) / (flux2_mu(1, steps) - flux2_mu(0, steps)))
    return max(FLUX2_JUMP + 1, round((mu - 0.45666666) / 0.00016927))


def check_kind(case: Case) -> Iterator[Finding]:
    """Levels of a discrete model on a flow model, or the other way round."""
    highest = 1.0 if case.facts.table is None else case.facts.table[-1].item()
    first = case.sigmas[0].item()
    if first > highest * 1.001:
        what = f"the list starts at {first:.4g}, above the model's highest level {highest:.4g}"
        yield Finding(
            "other_kind", "error", what, "use a scheduler of this model's family (SDTurboScheduler is for SD)"
        )
    elif case.facts.table is not None and abs(first - 1) < 1e-3 and case.part is None:
        what = f"the list starts at 1, like a flow model's, but this model's levels go up to {highest:.4g}"
        yield Finding("other_kind", "error", what, "use a scheduler of this model's family")


def check_open_end(case: Case) -> Iterator[Finding]:
    """A list that ends above 0."""
    last = case.sigmas[-1].item()
    if last > 0:
        what = f"the list ends at {last:.4g}, not 0: right for the first of two samplers, where the next starts there"
        yield Finding("open_end", "note", what, "sampled alone it leaves that much noise in the picture: end it in 0")


def check_steps(case: Case) -> Iterator[Finding]:
    row, steps = case.preset, case.steps
    if row is None or case.plain:
        return
    if case.part is not None:
        total = case.part.total
        if total in row.other_steps:
            what = f"{total} steps follow the rule of {row.title}, which was made for {spell(row.steps)}"
            others = [other.title for other in case.rivals if total in other.steps]
            what += f"; made for {total}: {', '.join(others)}" if others else ""
            yield Finding("steps", "note", what, f"{spell(row.steps)} steps are what was trained")
        return
    if not case.whole or steps in row.steps:
        return
    if steps - 1 in row.steps and _follows_rule(case):
        what = (
            f"{counted(steps)}, where {row.title} was made for {steps - 1}: some model cards count N + 1 for N "
            "forwards, ComfyUI does not"
        )
        yield Finding("one_step_more", "error", what, f"set steps to {steps - 1}")
    else:
        what = f"{counted(steps)}, but {row.title} was made for {spell(row.steps)}"
        yield Finding(
            "steps", "warning" if steps > min(row.steps) else "error", what, f"set steps to {spell(row.steps)}"
        )


def _follows_rule(case: Case) -> bool:
    """Whether the list is what the rule gives for its own number of steps, by shift."""
    found = fitted_alpha(case.sigmas)
    trained = None if case.trained is None else fitted_alpha(case.trained)
    return found is not None and trained is not None and abs(math.log(found / trained)) < 0.05


def check_which_file(case: Case) -> Iterator[Finding]:
    """The list is right, but for another distillation than the one that the family usually means."""
    if case.part is None or case.preset is None or case.usual in (None, case.preset):
        return
    usual = case.usual
    trained = fitted_alpha(preset_sigmas(usual)) if case.facts.table is None else None
    if trained is not None and case.distance(case.sigmas, twice_shifted_sigmas(case.steps, trained)) < 5e-3:
        what = f"it is the list of scheduler 'normal', which shifts twice; for {usual.title} it is 'simple'"
        yield Finding(
            "scheduler", "note", what, f"right for {case.preset.title} only: choose that preset to confirm it"
        )
        return
    what = (
        f"the list is right for {case.preset.title}; {usual.title} of the same family, for {spell(usual.steps)} steps, "
        "has another, and nothing says which file this is"
    )
    yield Finding("which_file", "note", what, f"choose preset {case.preset.key} or {usual.key}")


def check_flux2_jump(case: Case) -> Iterator[Finding]:
    if case.preset is None or case.preset.grid["kind"] != "flux2" or case.steps > 100 or case.plain:
        return
    alpha = fitted_alpha(case.sigmas) if case.whole else None
    if alpha is None:
        return
    mu, tokens = math.log(alpha), case.tokens or flux2_tokens(case.sigmas)
    if tokens > FLUX2_JUMP and abs(mu - flux2_mu(tokens, case.steps)) < 0.02:
        before = flux2_mu(FLUX2_JUMP, case.steps)
        what = (
            f"Flux2Scheduler's formula, which is its maker's, changes branch above {FLUX2_JUMP} tokens: mu is {mu:.3g} "
            f"(alpha {alpha:.3g}) for {tokens} tokens, where just below the jump it is {before:.3g} "
            f"(alpha {math.exp(before):.3g}); which of them is better was not tried"
        )
        yield Finding("flux2_jump", "note", what, "try the repaired SIGMAS, which keep the shift from below the jump")


def check_list(case: Case) -> Iterator[Finding]:
    """Is it the trained list or a part of it; if not, which mistake makes this list of it?"""
    if case.trained is None or case.part is not None or case.plain or any(check_kind(case)):
        return
    if any(check_flux2_jump(case)):
        return
    found, trained = fitted_alpha(case.sigmas), fitted_alpha(case.trained)
    if not case.whole:
        what = f"the part from {case.sigmas[0]:.4g} to {case.sigmas[-1]:.4g} is none of the trained list"
        fault, why = _cause(case, found, trained)
        fix = "use the repaired SIGMAS, which keep these ends"
        if lies_above(case.sigmas, case.trained):
            fix = f"use levels from {case.trained[0]:.4g} on; nothing of the trained list lies between these ends"
        yield Finding(fault, "warning", f"{what}: {why}", fix)
    elif case.steps == len(case.trained) - 1:
        gap = case.distance(case.sigmas, case.trained)
        fault, why = _cause(case, found, trained)
        what = f"the list is up to {gap:.3g} (in flow time) away from the trained one: {why}"
        yield Finding(fault, "error", what, f"use the repaired SIGMAS{_shift_to_set(case, trained)}")
    elif trained is None:
        fault, why = _cause(case, found, trained)
        yield Finding(fault, "error", f"the trained levels are published numbers: {why}", "use the repaired SIGMAS")


def _shift_to_set(case: Case, trained: float | None) -> str:
    """What to do with the shift node, so that a scheduler gives the trained list as well."""
    native = case.facts.native_shift_alpha
    if trained is None or native is None:
        return ""
    if case.facts.patched and abs(math.log(native / trained)) < 0.06:
        return ", and remove the shift node"
    return f", or set the shift to {trained:.4g} (mu {math.log(trained):.4g})"


def _cause(case: Case, found: float | None, trained: float | None) -> tuple[str, str]:
    """The name of the mistake and its description. found, trained: shift factors of the two lists, if they have one."""
    near = lambda a, b: b > 0 and abs(math.log(a / b)) < 0.03  # noqa: E731
    if case.trained is not None and starts_above(case.sigmas, case.trained, case.facts.table):
        return "other_list", f"it starts at {case.sigmas[0]:.4g}, where {case.trained[0]:.4g} was the first level"
    if case.facts.table is None and len(case.sigmas) > 2 and 0.005 < case.sigmas[-2] and _stretched(case):
        return "other_list", (
            f"its last level before 0 is {case.sigmas[-2]:.4g}, where a scheduler with shift_terminal stretches to; it "
            "was given the trained levels and processed them again"
        )
    if found is None or trained is None:
        if trained is not None and case.distance(case.sigmas, twice_shifted_sigmas(case.steps, trained)) < 5e-3:
            return "scheduler", "it is that of scheduler 'normal', which shifts twice; the trained one is 'simple'"
        factor = _shift_between(case)
        if factor is not None and factor > 1:
            return "shift_twice", f"it is the trained list shifted once more, by {factor:.4g}"
        if factor is not None:
            return "unshifted", (
                f"shifted by {1 / factor:.4g} it would be the trained one: these are levels that a scheduler is given, "
                "not those that the network sees"
            )
        return "other_list", "no shift of evenly spaced levels gives it; a scheduler such as karras or beta may have"
    if trained > 1.001 and near(found, math.log(trained)):
        mu = math.log(trained)
        return "shift_unit", (
            f"it is that of alpha {found:.4g}, the number of mu {mu:.4g} typed where a factor is expected "
            f"(alpha = e^mu = {trained:.4g}); ModelSamplingSD3 and AuraFlow take the factor, ModelSamplingFlux takes mu"
        )
    if near(found, math.exp(min(trained, 50.0))):
        return "shift_unit", (
            f"it is that of alpha {found:.4g} = e^{trained:.4g}, a factor typed where its logarithm mu is expected "
            f"(mu = {math.log(trained):.4g}); ModelSamplingFlux takes mu, ModelSamplingSD3 and AuraFlow the factor"
        )
    if trained > 1.001 and near(found, trained**2):
        return "shift_twice", f"the shift {trained:.4g} was applied twice, which gives {found:.4g}"
    if near(found, 1.0):
        return "unshifted", f"it has no shift, where {trained:.4g} was trained"
    return "other_shift", f"its shift is {found:.4g}, where {trained:.4g} was trained"


def _stretched(case: Case) -> bool:
    """Whether the last level is one of those that diffusers' configurations stretch to, and not a trained one."""
    last, trained = case.sigmas[-2].item(), [] if case.trained is None else case.trained.tolist()
    terminal = any(abs(last - level) < 1e-3 for level in (0.1, 0.02))
    return terminal and all(abs(last - level) > 1e-3 for level in trained)


def _shift_between(case: Case) -> float | None:
    """The factor that shifts the trained list into the given one, None if none does."""
    trained = case.trained
    if case.facts.table is not None or trained is None or len(case.sigmas) != len(trained) or case.steps < 3:
        return None
    ratios = case.sigmas[1:-1].double().logit() - trained[1:-1].double().logit()
    middle = ratios.median()
    return middle.exp().item() if (ratios - middle).abs().max() < 0.1 and abs(middle) > 0.03 else None
