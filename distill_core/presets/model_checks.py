"""What can be wrong with the model beside its noise levels: time scale, prediction, LoRAs, guidance, cfg."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..diffusion.schedules import shifted_sigmas
from ..lora_files import NAMESPACE
from .checks import Case, Finding, fitted_alpha
from .parts import SAME
from .recipe import RIVALS, describe_metadata, is_of_family, rival_loras
from .table import counted, presets_of


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


def check_rivals(case: Case) -> Iterator[Finding]:
    if rivals := rival_loras(case.facts):
        fix = "leave one of them out; both together are not what either was trained for"
        yield Finding("two_turbo_loras", "error", f"{' and '.join(rivals)} {RIVALS}", fix)


def check_prediction(case: Case) -> Iterator[Finding]:
    wanted = (case.preset and case.preset.prediction) or case.facts.native_prediction
    also = case.preset and case.preset.prediction_too
    if case.facts.prediction not in (wanted, also):
        what = f"the network's output is taken for {case.facts.prediction}, but this model predicts {wanted}"
        severity = "warning" if "lcm" in case.facts.prediction.lower() else "error"
        fix = "remove the ModelSampling node" if case.facts.patched else f"add ModelSamplingDiscrete with {wanted}"
        yield Finding("prediction", severity, what, fix)


def check_shift_node(case: Case) -> Iterator[Finding]:
    facts, row = case.facts, case.preset
    if not facts.patched or facts.shift_alpha is None or facts.native_shift_alpha is None or case.trained is None:
        return
    wanted = fitted_alpha(case.trained)
    if wanted is None or case.plain or (case.part is None and case.steps != len(case.trained) - 1):
        return
    steps = len(case.trained) - 1
    own, native = (shifted_sigmas(steps, shift_alpha=a) for a in (facts.shift_alpha, facts.native_shift_alpha))
    if case.distance(native, case.trained) <= SAME < case.distance(own, case.trained):
        what = (
            f"a shift node too many: the model's own shift (alpha {facts.native_shift_alpha:.4g}) already gives the "
            f"trained list, the node changed it to {facts.shift_alpha:.4g}"
        )
        severity = "error" if case.part is None else "warning"
        yield Finding("extra_shift_node", severity, what, "remove the shift node; the MODEL output here is repaired")
    elif (
        case.distance(own, native) <= SAME
        and facts.audio_shift is None
        and (row is None or not row.noise_scale)
        and not any(check_time_scale(case))
    ):
        what = "the shift node before this model changes nothing"
        yield Finding("idle_shift_node", "note", what, "it can be removed")


def check_lora(case: Case) -> Iterator[Finding]:
    """Whether the LoRA that a preset is, or that described itself, is on the model at its strength."""
    facts, row = case.facts, case.preset
    for lora in facts.loras:
        described = describe_metadata(lora.metadata)
        if not is_of_family(described, facts.family):
            what = f"{lora.name} was made for {described['family']}, but the model is {facts.family}"
            yield Finding("other_family", "error", what, f"load a LoRA of {facts.family}")
        elif not lora.layers:
            what = f"{lora.name} was loaded, but none of its keys fitted this model, so it is not on it"
            yield Finding("lora_not_on", "error", what, "load a LoRA that was made for this model")
        elif row is None and abs(lora.strength - 1) > 0.05:
            what = f"{lora.name} is on at {lora.strength:g}, but was trained for 1"
            yield Finding("lora_strength", "warning", what, "set its strength to 1")
    if row is None or not row.lora or facts.strengths is None:
        return
    wanted = row.lora_strength or 1.0
    if not facts.strengths:
        what = f"{row.title} is a LoRA, and no LoRA is on this model"
        if case.plain:
            what += "; it is sampled like its teacher, so levels and cfg were not compared"
        fix = "load the LoRA; nothing has to be done if it is merged into the file"
        yield Finding("no_lora", "warning", what, fix)
    elif not any(abs(strength - wanted) <= 0.05 * wanted for strength in facts.strengths):
        strengths = " and ".join(f"{strength:g}" for strength in facts.strengths)
        what = f"LoRAs are on at {strengths}, but {row.title} was trained for {wanted:g}"
        yield Finding("lora_strength", "warning", what, f"set its strength to {wanted:g}")


def check_family(case: Case) -> Iterator[Finding]:
    """A checkpoint that says of itself that it is of another family."""
    described = describe_metadata(case.facts.metadata)
    if not is_of_family(described, case.facts.family):
        what = f"the metadata is that of a {described['family']} file, but the model is {case.facts.family}"
        yield Finding("other_family", "error", what, "choose a preset of the model's family")


def check_guidance(case: Case) -> Iterator[Finding]:
    row = case.preset
    wanted = row.guidance if row is not None else None
    if row is not None and wanted is not None and case.guidance is not None and not abs(case.guidance - wanted) <= 0.01:
        what = f"embedded guidance is {case.guidance:g}, but {row.title} was made for {wanted:g}"
        yield Finding("guidance", "warning", what, f"set FluxGuidance to {wanted:g}")


def check_noise_scale(case: Case) -> Iterator[Finding]:
    """A tenth apart is the same: sources differ by that much."""
    wanted = (case.preset and case.preset.noise_scale) or case.facts.native_noise_scale
    if abs(case.facts.noise_scale - wanted) > 0.1 + 1e-6:
        what = f"the noise is scaled by {case.facts.noise_scale:g}, but this model was made for {wanted:g}"
        yield Finding("noise_scale", "warning", what, f"set ModelNoiseScale to {wanted:g}")


def check_audio_shift(case: Case) -> Iterator[Finding]:
    row, given = case.preset, case.facts.audio_shift
    wanted = row.audio_shift if row is not None else None
    if row is None or wanted is None or case.plain or (given is not None and abs(given - wanted) <= 0.02 * wanted):
        return
    has = "the shift node dropped it" if given is None else f"it is {given:g}"
    what = f"the sound has a shift of its own, {wanted:g} for {row.title}; {has}"
    fix = "use MiniMax H3 Sigma Shift and no other shift node; the MODEL output here is repaired"
    yield Finding("audio_shift", "error", what, fix)


def check_cfg(case: Case) -> Iterator[Finding]:
    row, cfg = case.preset, case.cfg
    if case.plain:
        return
    steps = case.steps if case.trained is None else len(case.trained) - 1
    wanted = 1.0 if row is None else row.cfg_at(steps)
    highest = 1.0 if row is None else max(row.cfg_max, wanted, *row.cfg_by_steps.values())
    distilled = row is not None or case.facts.guidance_embedded or f"{NAMESPACE}cfg" in case.facts.metadata
    if not math.isfinite(cfg):
        yield Finding("cfg", "error", f"cfg is {cfg:g}, which leaves no picture", f"set cfg to {wanted:g}")
    elif distilled and cfg > highest + 1e-3:
        name = row.title if row else "this model"
        what = f"cfg {cfg:g} on {name}, whose guidance is distilled in: twice the time and burnt pictures"
        if wanted > 1:
            what = f"cfg {cfg:g} on {name}, which is used with {highest:g} at most: burnt pictures"
        extra = "; set guidance with FluxGuidance" if case.facts.guidance_embedded else ""
        yield Finding("cfg", "error", what, f"set cfg to {wanted:g}{extra}")
    elif row is not None and cfg < min(wanted, row.cfg, *row.cfg_by_steps.values()) - 1e-3:
        what = f"cfg {cfg:g}, but {row.title} was made for cfg {wanted:g} at {counted(steps)}"
        yield Finding("cfg_low", "warning", what, f"set cfg to {wanted:g}")


def unknown(case: Case) -> list[str]:
    """What was not examined because nothing says it, in words."""
    facts, row = case.facts, case.preset
    sized = row is not None and row.grid["kind"] in ("flux", "flux2")
    known = any(other.known for other in presets_of(facts.family, facts.guidance_embedded))
    asked = {
        "the noise levels: no trained list is known for this model": case.trained is None and not known,
        "the noise levels: nothing says which of its family's lists this model was trained for; choose a preset": (
            case.trained is None and known
        ),
        "whether the turbo LoRA is on the model": row is not None and row.lora and facts.strengths is None,
        "whether the LoRA on the model is the turbo LoRA": bool(row is not None and row.lora and facts.strengths),
        "embedded guidance: connect the positive conditioning": bool(
            row is not None and row.guidance is not None and case.guidance is None
        ),
        "the shift for the picture's size: give width and height": sized and case.tokens is None,
    }
    return [text for text, open_ in asked.items() if open_]
