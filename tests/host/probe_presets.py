"""Runs inside the host's Python: which of core's own schedulers give a preset's levels, as JSON.

probe_presets.py FOLDER
"""

from as_host import folder

# isort: split
import inspect
import json
import math
import types

import comfy.model_base
import comfy.model_sampling
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as core
import comfy_extras.nodes_flux as core_flux
import comfy_extras.nodes_model_advanced as core_models
import tiny_models
import torch
from pack.distill_core.models.families import FAMILIES
from pack.distill_core.presets.doctor import diagnose
from pack.distill_core.presets.levels import preset_sigmas, shift_alpha_of
from pack.distill_core.presets.table import Preset, presets
from pack.nodes.host import model as host_model

SCHEDULERS = ["simple", "sgm_uniform", *comfy.samplers.SCHEDULER_NAMES]
MU_CLASSES = ("Flux", "Flux2", "Lens", "QwenImage", "Krea2")  # their "shift" is a logarithm


def sampling(alpha: float | None, size: bool = False):
    """Core's table of levels: of a flow model shifted by ``alpha``, or Stable Diffusion's.

    size: as ModelSamplingFlux makes it, of 10000 levels; else as ModelSamplingSD3 and AuraFlow do, of 1000.
    """
    if alpha is None:
        return comfy.model_sampling.ModelSamplingDiscrete()
    flow = (comfy.model_sampling.ModelSamplingFlux if size else comfy.model_sampling.ModelSamplingDiscreteFlow)()
    flow.set_parameters(shift=math.log(alpha) if size else alpha)
    return flow


def own_alpha(family: str) -> float | None:
    """The shift factor that core's configuration of a family sets."""
    for name in FAMILIES[family].host_models:
        settings = getattr(comfy.supported_models, name).sampling_settings
        if "shift" in settings:
            return math.exp(settings["shift"]) if name in MU_CLASSES else settings["shift"]
    return None


def distance(row: Preset, a: torch.Tensor, b: torch.Tensor) -> float:
    if len(a) != len(b) or not a.isfinite().all():
        return math.inf
    if row.grid["kind"] == "timesteps":
        a, b = a / (1 + a), b / (1 + b)
    return (a - b).abs().max().item()


def nearest(row: Preset) -> dict:
    """The first of core's schedulers whose list is the nearest, over all step counts: its name and its distance."""
    best = {"scheduler": "", "distance": math.inf}
    for name in SCHEDULERS:
        far = 0.0
        for steps in row.steps:
            alpha = alphas(row, steps)
            try:
                levels = comfy.samplers.calculate_sigmas(sampling(alpha, row.grid["kind"] == "flux"), name, steps)
            except Exception:  # linear_quadratic, kl_optimal and others refuse small counts
                far = math.inf
                break
            far = max(far, distance(row, levels, preset_sigmas(row, steps)))
        if far < best["distance"] - 1e-4:
            best = {"scheduler": name, "distance": far}
    return best


def alphas(row: Preset, steps: int) -> float | None:
    kind = row.grid["kind"]
    if kind == "timesteps":
        return None
    by_steps = row.grid.get("alpha_by_steps", {})
    return shift_alpha_of(row, steps, 4096) or by_steps.get(str(steps)) or row.grid.get("alpha") or 1.0


def at_ksampler(row: Preset) -> dict:
    """What the row says of KSampler, run: the largest distance over its step counts; 0 for rows that say none does."""
    said, far = row.ksampler or {}, 0.0
    if "scheduler" in said:
        for steps in row.steps:
            flow = None if row.grid["kind"] == "timesteps" else 1.0
            alpha = said.get("alpha_by_steps", {}).get(str(steps), said.get("alpha", flow))
            if "max_shift" in said:  # ModelSamplingFlux with base_shift 0.5 at 1024 x 1024, which is 4096 tokens
                alpha = math.exp(said["max_shift"])
            levels = comfy.samplers.calculate_sigmas(sampling(alpha, "max_shift" in said), said["scheduler"], steps)
            far = max(far, distance(row, levels, preset_sigmas(row, steps)))
    return {"distance": far, "says": said, "nearest": nearest(row), "own": own_alpha(row.families[0])}


def nodes() -> dict:
    """Scheduler nodes of core that give a preset's levels, which KSampler does not have."""

    class Model:
        def get_model_object(self, name):
            return sampling(None)

    turbo = core.SDTurboScheduler.execute(Model(), 4, 1.0)[0]
    flux2 = core_flux.Flux2Scheduler.execute(4, 1024, 1024)[0]
    rows = presets()
    return {
        "SDTurboScheduler": distance(rows["sdxl-turbo"], turbo, preset_sigmas(rows["sdxl-turbo"], 4)),
        "Flux2Scheduler": distance(rows["flux2-klein"], flux2, preset_sigmas(rows["flux2-klein"], 4)),
    }


def minimax() -> dict:
    """Shift nodes on core's sampling of MiniMax-H3, and what the Doctor's repair makes of them."""
    config = comfy.supported_models.MiniMaxH3({"image_model": "minimax_h3"})
    kind = inspect.signature(comfy.model_base.MiniMaxH3.__init__).parameters["model_type"].default
    native = comfy.model_base.model_sampling(config, kind)

    class Patcher:
        object_patches = {"model_sampling": None}
        model = types.SimpleNamespace(model_config=config, model_type=kind)

        def get_model_object(self, name):
            return native

        def clone(self):
            return self

        def add_object_patch(self, name, value):
            self.repaired = value

    repaired = host_model.with_native_sampling(Patcher(), 6.0, 3.0).repaired
    kept = host_model.with_native_sampling(Patcher(), 6.0).repaired
    return {
        "native": [native.shift, native.audio_shift],
        "repaired": [repaired.shift, repaired.audio_shift, repaired.audio_scale],
        "kept": [kept.shift, kept.audio_shift],
    }


def facts() -> dict:
    """What the host tells of LoRAs and guidance, and the official LCM workflow's model and list."""
    sd3, sd15 = (comfy.sd.load_diffusion_model(tiny_models.write(name, folder)) for name in ("sd3", "sd15"))
    key = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{key}.lora_A.weight": torch.ones(2, 128), f"{key}.lora_B.weight": torch.ones(128, 2)}
    on, _ = comfy.sd.load_lora_for_models(sd3, None, lora, 0.7, 0.0)
    lcm = core_models.ModelSamplingDiscrete().patch(sd15, "lcm", False)[0]
    levels = comfy.samplers.calculate_sigmas(lcm.get_model_object("model_sampling"), "sgm_uniform", 5)
    found = diagnose(host_model.facts_of(lcm), levels, 1.8, "lcm-lora")
    guided = [[torch.zeros(1), {"guidance": 2.5}]]
    return {
        "strengths": [host_model.facts_of(model).strengths for model in (sd3, on)],
        "guidance": [host_model.guidance_of(conditioning) for conditioning in (guided, [[torch.zeros(1), {}]])],
        "lcm": {finding.fault: finding.severity for finding in found.findings},
    }


if __name__ == "__main__":
    found = {row.key: at_ksampler(row) for row in presets().values() if row.known}
    (folder / "results.json").write_text(
        json.dumps({"rows": found, "nodes": nodes(), "minimax": minimax(), "facts": facts()})
    )
