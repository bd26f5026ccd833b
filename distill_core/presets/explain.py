"""The table of presets in words: one preset's account, and the page of all."""

from __future__ import annotations

from torch import Tensor

from .reference import HOST
from .table import Preset, counted, presets, spell

CORE_SAMPLERS = {"renoise": "lcm", "euler": "euler", "ancestral": "euler_ancestral"}  # the same, by ComfyUI's name
TRUST = {"A": "read at the source", "B": "second hand"}


def explain(preset: Preset, steps: int, sigmas: Tensor) -> str:
    """A readable account of a preset and the levels made from it, with its source."""
    levels = ", ".join(f"{level:.4g}" for level in sigmas.tolist())
    cfg = preset.cfg_at(steps)
    lines = [
        f"{preset.title}  [{preset.key}]",
        f"{counted(len(sigmas) - 1)}: {levels}",
        f"sampler {preset.sampler or 'of its own'}"
        + (f", eta {preset.eta:g}" if preset.eta is not None else "")
        + f"; cfg {cfg:g}"
        + (f" (up to {preset.cfg_max:g} is in use)" if preset.cfg_max > cfg else ""),
        in_ksampler(preset) + ".",
    ]
    if steps not in preset.steps:
        lines.append(f"Made for {spell(preset.steps)} steps; {steps} follow the same rule and were not trained.")
    lines += [line for line in _conditions(preset, steps) if line]
    trust = TRUST[preset.confidence]
    second = f"; the same says {preset.second}" if preset.second else ""
    return "\n".join([*lines, f"Source ({trust}): {preset.source}{second}"])


def _conditions(preset: Preset, steps: int) -> list[str]:
    """What has to be so beside the levels; empty strings for what is not asked."""
    return [
        f"For {preset.part}: it does not start from pure noise." if preset.part else "",
        f"The file must be the one made for {counted(steps)}."
        if preset.steps_of_file and steps in preset.steps
        else "",
        "" if not preset.lora else f"It is a LoRA, at strength {preset.lora_strength or 1:g}.",
        ""
        if preset.guidance is None
        else f"Embedded guidance {preset.guidance:g} (FluxGuidance; an input of the network, not cfg).",
        "" if preset.noise_scale is None else f"Noise scale {preset.noise_scale:g} (ModelNoiseScale).",
        "" if preset.audio_shift is None else f"Shift of the sound {preset.audio_shift:g}.",
        "" if preset.prediction is None else f"The network predicts {preset.prediction}: {preset.comfy}.",
        f"Note: {preset.note}" if preset.note else "",
    ]


def in_ksampler(preset: Preset) -> str:
    """Which sampler, scheduler and shift give the levels in ComfyUI's own KSampler, or that none does.

    ``preset.ksampler`` holds scheduler and alpha (own: the model has that shift by itself), alpha_by_steps, or
    max_shift (of ModelSamplingFlux with base_shift 0.5), or node: a scheduler node for SamplerCustom.
    """
    said = preset.ksampler or {}
    if not preset.known:
        return preset.comfy if preset.comfy.startswith("KSampler") else "KSampler: not known"
    if "node" in said:
        return f"KSampler: none of its schedulers gives these levels; {said['node']} with SamplerCustom does"
    if not said:
        return "KSampler: none of its schedulers gives these levels; use SamplerCustom with the SIGMAS"
    by_steps = " or ".join(f"{alpha:g} for {steps} steps" for steps, alpha in said.get("alpha_by_steps", {}).items())
    shift = f", shift {by_steps}" if by_steps else ""
    if "alpha" in said:
        shift = ", no shift node" if said.get("own") else f", shift {said['alpha']:g}"
    elif "max_shift" in said:
        shift = f", ModelSamplingFlux with max_shift {said['max_shift']:g}, base_shift 0.5 and the picture's size"
    sampler = CORE_SAMPLERS.get(preset.sampler or "", "")
    how = f"scheduler {said['scheduler']}{shift}"
    if not sampler:
        return f"KSampler: has not its sampler; {how} gives the levels for SamplerCustom"
    return f"KSampler: sampler {sampler}, {how}"


def table_page() -> str:
    """docs/presets.md: every preset with its settings, the source, how sure we are of it and when it was checked."""
    rows = list(presets().values())
    known = sum(row.known for row in rows)
    sure = sum(row.confidence == "A" for row in rows)
    second = sum(bool(row.second) for row in rows)
    lines = [
        "# Presets",
        "",
        f"{len(rows)} presets: {known} with noise levels, {len(rows) - known} that say why none are known. {sure} were "
        f"read at the author's source (A), {len(rows) - sure} are second hand (B). {second} have a second source.",
        "",
        "This page is written by `python -m distill_core presets table`. `python -m distill_core presets KEY` prints "
        "one with its levels; `python -m distill_core presets check` runs each through its reference scheduler and "
        "lists what is supported by one source only. Steps in brackets follow the same rule and were not trained.",
        "",
        "| preset | model | steps | sampler, cfg | in ComfyUI's KSampler | levels made by | source | sure | checked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = spell(row.steps) + (f" ({', '.join(map(str, row.other_steps))})" if row.other_steps else "")
        source = row.source + (f"; also {row.second}" if row.second else "")
        cells = (
            f"`{row.key}`",
            row.title + (f" ({row.part})" if row.part else ""),
            steps,
            f"{row.sampler or 'its own'}, {row.cfg:g}",
            in_ksampler(row).removeprefix("KSampler: "),
            _made_by(row),
            source,
            row.confidence,
            row.checked or "-",
        )
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _made_by(row: Preset) -> str:
    if row.reference is None:
        return "-"
    if row.reference["scheduler"] == HOST:
        return f"{HOST}'s {row.reference['given']}"
    shift = row.reference.get("config", {}).get("shift")
    return row.reference["scheduler"] + (f", shift {shift:g}" if shift and "mu" not in row.reference else "")
