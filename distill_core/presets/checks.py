"""The faults that a turbo model's noise levels can have, each with how it is recognised and cured (doctor.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.schedules import shifted_sigmas
from .recipe import ModelFacts
from .table import FLUX2_JUMP, Preset, flux2_mu, spell, twice_shifted_sigmas

SAME = 0.02  # flow time; Qwen's own alpha 3.158 instead of Lightning's 3 is 0.013 away and makes no visible difference
SEVERITIES = ("error", "warning", "note")  # the picture will be wrong / may be worse / good to know


@dataclass(frozen=True)
class SamplingFacts(ModelFacts):
    """`ModelFacts` and how the connected MODEL is set up, beside how its family is by nature.

    timestep_of, native_timestep_of: sigma [N] -> the network's time input, as set up and by nature.
    patched: a ModelSampling
    node sits before the model.  shift_alpha, native_shift_alpha: the factor that its schedulers shift flow levels with,
    None for other models.  prediction, native_prediction: names of what the network's output is taken for.
    guidance_embedded: the network has guidance as an input.
    """

    timestep_of: Callable[[Tensor], Tensor] = lambda sigma: sigma
    native_timestep_of: Callable[[Tensor], Tensor] = lambda sigma: sigma
    patched: bool = False
    shift_alpha: float | None = None
    native_shift_alpha: float | None = None
    prediction: str = ""
    native_prediction: str = ""
    guidance_embedded: bool = False


@dataclass(frozen=True)
class Finding:
    """fault: a stable name.  severity: one of `SEVERITIES`.  what: in words, with numbers.  fix: what to do."""

    fault: str
    severity: str
    what: str
    fix: str


@dataclass(frozen=True)
class Case:
    """What the single checks look at; ``trained`` is None where no list is known for this many steps."""

    facts: SamplingFacts
    preset: Preset | None
    sigmas: Tensor
    trained: Tensor | None
    cfg: float
    tokens: int | None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def flow_time(self, sigmas: Tensor) -> Tensor:
        return sigmas if self.facts.table is None else sigmas / (1 + sigmas)

    def distance(self, a: Tensor, b: Tensor) -> float:
        """The largest difference of two equally long lists in flow time."""
        return (self.flow_time(a) - self.flow_time(b)).abs().max().item() if len(a) == len(b) else math.inf


def fitted_alpha(sigmas: Tensor) -> float | None:
    """The shift factor whose evenly spaced list this is, to 0.003; None if it is none, or has one step."""
    steps = len(sigmas) - 1
    inner = sigmas[1:-1].double()
    if steps < 2 or sigmas[0] < 0.999 or sigmas[0] > 1.001:
        return None
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[1:-1]
    alpha = (inner.logit() - even.logit()).mean().exp().item()
    residual = (shifted_sigmas(steps, shift_alpha=alpha) - sigmas).abs().max()
    return alpha if residual < 3e-3 else None


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
    elif case.facts.table is not None and abs(first - 1) < 1e-3:
        what = f"the list starts at 1, like a flow model's, but this model's levels go up to {highest:.4g}"
        yield Finding("other_kind", "error", what, "use a scheduler of this model's family")


def check_time_scale(case: Case) -> Iterator[Finding]:
    levels = case.sigmas[:-1]
    given, native = case.facts.timestep_of(levels).float(), case.facts.native_timestep_of(levels).float()
    if (given - native).abs().max() <= 0.03 * native.abs().max():
        return
    ratio = (given / native).abs().median().item()
    size = f"{ratio:.4g} times too big" if ratio > 1 else f"{1 / ratio:.4g} times too small"
    what = (
        f"at level {levels[0]:.4g} the network is given time {given[0]:.4g}, but was trained with {native[0]:.4g} "
        f"({size}): a ModelSampling node set another timestep multiplier"
    )
    scale = native[0].item() / levels[0].item()
    node = "ModelSamplingSD3 (multiplier 1000)" if scale > 10 else "ModelSamplingAuraFlow (multiplier 1)"
    yield Finding("time_scale", "error", what, f"remove the node, or use {node}; the MODEL output here is repaired")


def check_prediction(case: Case) -> Iterator[Finding]:
    wanted = (case.preset and case.preset.prediction) or case.facts.native_prediction
    if case.facts.prediction != wanted:
        what = f"the network's output is taken for {case.facts.prediction}, but this model predicts {wanted}"
        severity = "warning" if "lcm" in case.facts.prediction.lower() else "error"
        fix = "remove the ModelSampling node" if case.facts.patched else f"add ModelSamplingDiscrete with {wanted}"
        yield Finding("prediction", severity, what, fix)


def check_steps(case: Case) -> Iterator[Finding]:
    if case.preset is None or case.steps in case.preset.steps:
        return
    row, steps = case.preset, case.steps
    if steps - 1 in row.steps:
        what = (
            f"{steps} steps, where {row.title} was made for {steps - 1}: some model cards count N + 1 for N forwards, "
            "ComfyUI does not"
        )
        yield Finding("one_step_more", "error", what, f"set steps to {steps - 1}")
    else:
        what = f"{steps} steps, but {row.title} was made for {spell(row.steps)}"
        yield Finding(
            "steps", "warning" if steps > min(row.steps) else "error", what, f"set steps to {spell(row.steps)}"
        )


def check_flux2_jump(case: Case) -> Iterator[Finding]:
    if case.preset is None or case.preset.grid["kind"] != "flux2" or case.steps > 100:
        return
    alpha = fitted_alpha(case.sigmas)
    if alpha is None:
        return
    mu, tokens = math.log(alpha), case.tokens or flux2_tokens(case.sigmas)
    if tokens > FLUX2_JUMP and abs(mu - flux2_mu(tokens, case.steps)) < 0.02:
        before = flux2_mu(FLUX2_JUMP, case.steps)
        what = (
            f"Flux2Scheduler's formula changes branch above {FLUX2_JUMP} tokens: mu is {mu:.3g} (alpha {alpha:.3g}) "
            f"for {tokens} tokens, where just below the jump it is {before:.3g} (alpha {math.exp(before):.3g})"
        )
        yield Finding(
            "flux2_jump", "warning", what, "use the repaired SIGMAS, which keep the shift from below the jump"
        )


def check_list(case: Case) -> Iterator[Finding]:
    """Is it the trained list; if not, which mistake makes this list of it?"""
    if case.trained is None or case.steps != len(case.trained) - 1:
        return
    distance = case.distance(case.sigmas, case.trained)
    if distance <= SAME or any(check_kind(case)) or any(check_flux2_jump(case)):
        return
    found, trained = fitted_alpha(case.sigmas), fitted_alpha(case.trained)
    gap = f"the list is up to {distance:.3g} (in flow time) away from the trained one"
    fault, why = _cause(case, found, trained)
    fix = "use the repaired SIGMAS" + (", and remove the shift node" if case.facts.patched else "")
    yield Finding(fault, "error", f"{gap}: {why}", fix)


def _cause(case: Case, found: float | None, trained: float | None) -> tuple[str, str]:
    """The name of the mistake and its description. found, trained: shift factors of the two lists, if they have one."""
    near = lambda a, b: b > 0 and abs(math.log(a / b)) < 0.03  # noqa: E731
    if found is None or trained is None:
        if trained is not None and case.distance(case.sigmas, twice_shifted_sigmas(case.steps, trained)) < 5e-3:
            return "scheduler", "it is that of scheduler 'normal', which shifts twice; the trained one is 'simple'"
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


def check_shift_node(case: Case) -> Iterator[Finding]:
    facts = case.facts
    if not facts.patched or facts.shift_alpha is None or facts.native_shift_alpha is None or case.trained is None:
        return
    wanted = fitted_alpha(case.trained)
    own, native = (shifted_sigmas(case.steps, shift_alpha=a) for a in (facts.shift_alpha, facts.native_shift_alpha))
    if wanted is None or case.steps != len(case.trained) - 1:
        return
    if case.distance(native, case.trained) <= SAME < case.distance(own, case.trained):
        what = (
            f"a shift node too many: the model's own shift (alpha {facts.native_shift_alpha:.4g}) already gives the "
            f"trained list, the node changed it to {facts.shift_alpha:.4g}"
        )
        severity = "error" if case.distance(case.sigmas, case.trained) > SAME else "warning"
        yield Finding("extra_shift_node", severity, what, "remove the shift node; the MODEL output here is repaired")
    elif case.distance(own, native) <= SAME and not any(check_time_scale(case)):
        what = "the shift node before this model changes nothing"
        yield Finding("idle_shift_node", "note", what, "it can be removed")


def check_cfg(case: Case) -> Iterator[Finding]:
    row, cfg = case.preset, case.cfg
    wanted = 1.0 if row is None else row.cfg_at(case.steps)
    highest = 1.0 if row is None else max(row.cfg_max, wanted)
    distilled = row is not None or case.facts.guidance_embedded or "turbo_distill.cfg" in case.facts.metadata
    if distilled and cfg > highest + 1e-3:
        name = row.title if row else "this model"
        what = f"cfg {cfg:g} on {name}, whose guidance is distilled in: twice the time and burnt pictures"
        extra = "; set guidance with FluxGuidance" if case.facts.guidance_embedded else ""
        yield Finding("cfg", "error", what, f"set cfg to {wanted:g}{extra}")
    elif row is not None and cfg < wanted - 1e-3:
        what = f"cfg {cfg:g}, but {row.title} was made for cfg {wanted:g} at {case.steps} steps"
        yield Finding("cfg_low", "warning", what, f"set cfg to {wanted:g}")


CHECKS = (
    check_kind,
    check_time_scale,
    check_prediction,
    check_steps,
    check_flux2_jump,
    check_list,
    check_shift_node,
    check_cfg,
)
