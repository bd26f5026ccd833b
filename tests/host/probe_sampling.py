"""Runs inside the host's Python: the pack's sampling nodes and core's own on tiny models, results as JSON.

    probe_sampling.py FOLDER

Each function below measures one thing and returns what JSON can hold; test_sampling_nodes.py says what it must be.
"""

from as_host import folder

# isort: split
import dataclasses
import json

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_custom_sampler as core
import comfy_extras.nodes_flux as core_flux
import comfy_extras.nodes_model_advanced as core_models
import latent_preview
import tiny_models
import torch
from pack.distill_core.diffusion.noise import ItemNoise
from pack.distill_core.diffusion.samplers import SAMPLERS
from pack.distill_core.diffusion.schedules import DENOISE_MODES
from pack.distill_core.presets.doctor import diagnose
from pack.distill_core.presets.recipe import make_recipe
from pack.nodes import doctor, sampling
from pack.nodes.host import model as host_model
from pack.nodes.host import sampling as host_sampling

DENOISES = [round(0.3 + 0.01 * i, 2) for i in range(71)]
PATHS = {family: tiny_models.write(family, folder) for family in tiny_models.BUILDERS}
MODELS = {family: comfy.sd.load_diffusion_model(path) for family, path in PATHS.items()}
LEVELS = {"sd15": [14.61, 4.08, 1.61, 0.69, 0.0]}


def scheduler(model, name: str, steps: int) -> list[float]:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps).tolist()


def turbo(family: str, latent: dict, seed: int = 3, model=None, **choice) -> torch.Tensor:
    """The result of Turbo Sampler at four levels of the family's kind, unless ``choice`` says otherwise."""
    inputs = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=seed, sampler="renoise", cfg=1.0)
    inputs["sigmas"] = torch.tensor(LEVELS.get(family, [1.0, 0.9, 0.75, 0.5, 0.0]))
    inputs |= choice
    positive = tiny_models.conditioning(family)
    return sampling.TurboSampler.execute(model or MODELS[family], positive, latent, **inputs)[0]["samples"]


def families() -> dict:
    return {family: host_model.family_of(model) for family, model in MODELS.items()}


def item_alone_equals_item_in_batch() -> dict:
    """Per family and sampler: is image 2 of a batch of 3 bit for bit the image made alone?"""
    result = {}
    for family in MODELS:
        for name in SAMPLERS:
            batch = turbo(family, {"samples": tiny_models.empty_latent(family, 3)}, sampler=name)
            alone = {"samples": tiny_models.empty_latent(family), "batch_index": [2]}
            single = turbo(family, alone, sampler=name)
            differs = (batch[2:] - single).abs().max().item()
            other = (batch[1:2] - single).abs().max().item()
            result[f"{family} {name}"] = {"difference": differs, "from the neighbour": other}
    return result


def item_alone_in_core() -> float:
    """Core's lcm: image 1 of 2, and the same alone with its batch_index, as KSampler would draw it."""
    model, positive = MODELS["sd3"], tiny_models.conditioning("sd3")
    both = torch.zeros(2, 16, 8, 8)

    def run(latent, index):
        noise = comfy.sample.prepare_noise(latent, 3, index)
        return comfy.sample.sample(model, noise, 4, 1.0, "lcm", "simple", positive, positive, latent, seed=3)

    return (run(both, None)[1:] - run(both[:1], [1])).abs().max().item()


def select_in_custom_sampler() -> dict:
    """Turbo Sampler Select in core's SamplerCustom: image 2 of a batch, and alone with first_item 2."""
    result = {}
    model, positive = MODELS["sd3"], tiny_models.conditioning("sd3")
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    for name in SAMPLERS:
        samplers = [sampling.TurboSamplerSelect.execute(name, 0.5, first)[0] for first in (0, 2)]
        latents = [{"samples": torch.zeros(3, 16, 8, 8)}, {"samples": torch.zeros(1, 16, 8, 8), "batch_index": [2]}]
        batch, alone = (
            core.SamplerCustom.execute(model, True, 5, 1.0, positive, positive, sampler, sigmas, latent)[0]["samples"]
            for sampler, latent in zip(samplers, latents, strict=True)
        )
        result[name] = (batch[2:] - alone).abs().max().item()
    return result


def same_as_core_samplers() -> dict:
    """With the same noise our samplers give what core's give: the largest relative difference."""
    pairs = {"renoise": "lcm", "euler": "euler", "ancestral": "euler_ancestral"}
    result = {}
    for family in ("sd3", "flux", "flux-schnell", "sd15"):
        model, positive = MODELS[family], tiny_models.conditioning(family)
        latent, sigmas = tiny_models.empty_latent(family, 2), torch.tensor(LEVELS.get(family, [1.0, 0.9, 0.75, 0.5, 0]))
        for ours, theirs in pairs.items():
            outputs = []
            for kind in (ours, theirs):
                noise = ItemNoise(4, range(2))
                fresh = lambda sigma, sigma_next: noise.normal_like(latent)  # noqa: B023, E731
                if kind == ours:
                    sampler = host_sampling.host_sampler(ours, {}, fresh)
                else:
                    options = {} if theirs == "euler" else {"noise_sampler": fresh}
                    sampler = comfy.samplers.ksampler(theirs, options)
                outputs.append(
                    comfy.sample.sample_custom(
                        model,
                        ItemNoise(1, range(2)).normal_like(latent),
                        1.0,
                        sampler,
                        sigmas,
                        positive,
                        positive,
                        latent,
                        seed=0,
                    )
                )
            result[f"{family} {ours}"] = ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()).item()
    return result


def forwards_and_progress() -> dict:
    """Calls of the network and of the progress callback in four steps, at cfg 1 and at cfg 2."""
    result = {}
    for cfg in (1.0, 2.0):
        calls, rows, steps = [], [], []
        model, original = MODELS["sd3"].clone(), latent_preview.prepare_callback

        def count_rows(apply, args, rows=rows):
            rows.append(len(args["input"]))
            return apply(args["input"], args["timestep"], **args["c"])

        def spy(model, count, x0=None, original=original, calls=calls, steps=steps):
            steps.append(count)
            callback = original(model, count, x0)
            return lambda *args: calls.append(args[0]) or callback(*args)

        model.set_model_unet_function_wrapper(count_rows)
        latent_preview.prepare_callback = spy
        try:
            negative = tiny_models.conditioning("sd3", 2)
            turbo("sd3", {"samples": torch.zeros(1, 16, 8, 8)}, model=model, cfg=cfg, negative=negative)
        finally:
            latent_preview.prepare_callback = original
        result[str(cfg)] = {"rows": rows, "callbacks": calls, "bar": steps}
    return result


def inpainting() -> dict:
    """The largest change of the kept and of the masked part, per family and mode."""
    result = {}
    for family in ("sd3", "flux-schnell", "flux2", "sd15", "wan"):
        latent = tiny_models.empty_latent(family)
        half = latent.shape[-1] // 2
        image = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5)) * 3
        mask = torch.zeros(1, 8, 8)
        mask[:, :, 4:] = 1.0
        for mode in DENOISE_MODES:
            output = turbo(family, {"samples": image, "noise_mask": mask}, denoise=0.6, denoise_mode=mode)
            kept, masked = (output - image).abs().split(half, -1)
            result[f"{family} {mode}"] = {"kept": kept.max().item(), "masked": masked.max().item()}
    return result


def denoise_in_core() -> dict:
    """Start level over denoise of core's KSampler ('simple', SD3) and SDTurboScheduler (SD1.5)."""
    model, result = MODELS["sd3"], {}
    for steps in (1, 2, 4, 8):
        samplers = (comfy.samplers.KSampler(model, steps, "cpu", "euler", "simple", d) for d in DENOISES)
        result[str(steps)] = [sampler.sigmas[0].item() for sampler in samplers]
    small = core.SDTurboScheduler.execute(MODELS["sd15"], 4, 0.05)[0]
    short = core.SDTurboScheduler.execute(MODELS["sd15"], 4, 0.2)[0]
    return {"start": result, "turbo .05": small.tolist(), "turbo .2": short.tolist()}


def denoise_in_ours() -> dict:
    """Start level over denoise of ours, on the same trained lists."""
    facts, result = host_model.facts_of(MODELS["sd3"]), {}
    for steps in (1, 2, 4, 8):
        grid = torch.tensor(scheduler(MODELS["sd3"], "simple", steps))
        for mode in ("snap", "respace"):
            recipes = (make_recipe(facts, denoise=d, mode=mode, sigmas=grid) for d in DENOISES)
            result[f"{steps} {mode}"] = [recipe.sigmas[0].item() for recipe in recipes]
    facts = host_model.facts_of(MODELS["sd15"])
    turbo_grid = core.SDTurboScheduler.execute(MODELS["sd15"], 4, 1.0)[0]
    small = make_recipe(facts, denoise=0.05, sigmas=turbo_grid, sampler="ancestral").sigmas
    return {"start": result, "turbo .05": small.tolist()}


def lists_of_the_host() -> dict:
    """The host's lists behind defects 3, 4, 6, 7 and 8."""
    sd3, flux, sd15 = MODELS["sd3"], MODELS["flux"], MODELS["sd15"]
    aura = core_models.ModelSamplingAuraFlow().patch_aura(flux, 1.15)[0]
    mu = core_models.ModelSamplingFlux().patch(flux, 3.0, 3.0, 1024, 1024)[0]
    return {
        "turbo": core.SDTurboScheduler.execute(sd15, 4, 1.0)[0].tolist(),
        "trailing": scheduler(sd15, "simple", 4),
        "AuraFlow 1.15": scheduler(aura, "simple", 4),
        "Flux 3": scheduler(mu, "simple", 4),
        "sd3 simple": scheduler(sd3, "simple", 4),
        "sd3 normal": scheduler(sd3, "normal", 4),
        "sd3 simple 9": scheduler(sd3, "simple", 9),
        "flux2": {size: core_flux.Flux2Scheduler.execute(4, size, size)[0].tolist() for size in (1040, 1056, 2048)},
    }


def presets_on_the_host() -> dict:
    """Turbo Preset on each family: sigmas and cfg."""
    result = {}
    choices = [("sd3", "auto"), ("sd3", "sd3.5-large-turbo-official"), ("flux-schnell", "auto"), ("flux2", "auto")]
    for family, preset in [*choices, ("wan", "auto"), ("sd15", "lcm-lora"), ("flux", "hyper-flux-lora")]:
        sigmas, _, cfg, text = sampling.TurboPreset.execute(MODELS[family], preset, 0, 1.0, "snap").result
        result[f"{family} {preset}"] = {"sigmas": sigmas.tolist(), "cfg": cfg, "text": text}
    return result


def _examine(model, sigmas, cfg=1.0, preset="auto", width=0, height=0) -> dict:
    facts = host_model.facts_of(model)
    found = diagnose(facts, torch.tensor(sigmas), cfg, preset, width or None, height or None)
    report, mended, repaired = doctor.ScheduleDoctor.execute(
        model, torch.tensor(sigmas), cfg, preset, width, height
    ).result
    assert report == found.report
    return {"faults": [f.fault for f in found.findings], "report": report, "sigmas": repaired.tolist(), "model": mended}


def doctor_on_the_host() -> dict:
    """Each defect made with the host's own nodes, and what the doctor says."""
    sd3, flux, schnell, flux2 = (MODELS[name] for name in ("sd3", "flux", "flux-schnell", "flux2"))
    aura3 = core_models.ModelSamplingAuraFlow().patch_aura(sd3, 3.0)[0]
    sd3node = core_models.ModelSamplingSD3().patch(schnell, 1.0)[0]
    mu_as_factor = core_models.ModelSamplingAuraFlow().patch_aura(flux, 1.15)[0]
    factor_as_mu = core_models.ModelSamplingFlux().patch(sd3, 3.0, 3.0, 1024, 1024)[0]
    too_many = core_models.ModelSamplingSD3().patch(sd3, 9.0)[0]
    big = core_flux.Flux2Scheduler.execute(4, 1056, 1056)[0].tolist()
    turbo_grid = core.SDTurboScheduler.execute(MODELS["sd15"], 4, 1.0)[0].tolist()
    cases = {
        "healthy sd3": _examine(sd3, scheduler(sd3, "simple", 4)),
        "healthy schnell": _examine(schnell, scheduler(schnell, "simple", 4)),
        "healthy flux2": _examine(flux2, core_flux.Flux2Scheduler.execute(4, 1024, 1024)[0].tolist()),
        "AuraFlow on SD3": _examine(aura3, scheduler(aura3, "simple", 4)),
        "SD3 node on schnell": _examine(sd3node, scheduler(sd3node, "simple", 4)),
        "mu as factor": _examine(mu_as_factor, scheduler(mu_as_factor, "simple", 8), preset="hyper-flux-lora"),
        "factor as mu": _examine(factor_as_mu, scheduler(factor_as_mu, "simple", 4)),
        "shift node too many": _examine(too_many, scheduler(too_many, "simple", 4)),
        "normal": _examine(sd3, scheduler(sd3, "normal", 4)),
        "flux2 1056": _examine(flux2, big, width=1056, height=1056),
        "flux2 1056 unknown size": _examine(flux2, big),
        "cfg on schnell": _examine(schnell, scheduler(schnell, "simple", 4), cfg=3.5),
        "SDTurboScheduler on schnell": _examine(schnell, turbo_grid),
    }
    nine = dataclasses.replace(host_model.facts_of(sd3), family="z-image")  # no tiny Z-Image exists; its shift is SD3's
    found = diagnose(nine, torch.tensor(scheduler(sd3, "simple", 9)), 1.0)
    cases["z-image 9"] = {
        "faults": [f.fault for f in found.findings],
        "report": found.report,
        "sigmas": found.sigmas.tolist(),
    }
    result = {name: {key: value for key, value in case.items() if key != "model"} for name, case in cases.items()}
    for name, healthy in (("AuraFlow on SD3", sd3), ("SD3 node on schnell", schnell)):
        broken, mended = (aura3 if healthy is sd3 else sd3node), cases[name]["model"]
        family = "sd3" if healthy is sd3 else "flux-schnell"
        sigmas = torch.tensor([1.0, 0.75, 0.0])
        outputs = [
            turbo(family, {"samples": torch.zeros(1, 16, 8, 8)}, model=m, sigmas=sigmas)
            for m in (healthy, broken, mended)
        ]
        result[name]["broken differs"] = (outputs[1] - outputs[0]).abs().max().item()
        result[name]["mended differs"] = (outputs[2] - outputs[0]).abs().max().item()
    return result


def mistakes() -> dict:
    """The message of each mistake a user can make in Turbo Sampler."""
    image = {"samples": torch.zeros(1, 16, 8, 8)}
    cases = {
        "other family": ("sd3", image, dict(preset="flux-schnell", sigmas=None)),
        "steps": ("flux-schnell", image, dict(steps=9, sigmas=None)),
        "denoise 0": ("sd3", image, dict(denoise=0.0, sigmas=None)),
        "empty sigmas": ("sd3", image, dict(sigmas=torch.tensor([]))),
        "unsorted sigmas": ("sd3", image, dict(sigmas=torch.tensor([0.5, 1.0, 0.0]))),
        "unfinished sigmas": ("sd3", image, dict(sigmas=torch.tensor([1.0, 0.5]))),
        "video": ("wan", {"samples": torch.zeros(1, 16, 5, 8, 8)}, dict(preset="qwen-image-lightning-4", sigmas=None)),
        "video latent on an image model": ("sd3", {"samples": torch.zeros(1, 16, 5, 8, 8)}, {}),
        "other latent": ("sd3", {"samples": torch.ones(1, 4, 8, 8)}, {}),
        "no negative": ("sd3", image, dict(cfg=3.0)),
        "sd15 auto": ("sd15", {"samples": torch.zeros(1, 4, 8, 8)}, dict(sigmas=None, sampler="of the preset")),
    }
    result = {}
    for name, (family, latent, choice) in cases.items():
        try:
            turbo(family, latent, **choice)
            result[name] = "no error"
        except ValueError as error:
            result[name] = str(error)
        except Exception as error:  # the point of the test: anything else is not a clear message
            result[name] = f"{type(error).__name__}: {error}"
    return result


def metadata() -> dict:
    """A LoRA with our metadata, loaded by core: auto reads it, and so does a checkpoint's own."""
    from safetensors.torch import save_file

    described = {
        "turbo_distill.sigmas": "[1.0, 0.6, 0.3]",
        "turbo_distill.sampler": "renoise",
        "turbo_distill.cfg": "1.0",
    }
    key = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{key}.lora_A.weight": torch.zeros(2, 128), f"{key}.lora_B.weight": torch.zeros(128, 2)}
    save_file(state, folder / "lora.safetensors", described)
    lora, metadata = comfy.utils.load_torch_file(str(folder / "lora.safetensors"), return_metadata=True)
    with_lora, _ = comfy.sd.load_lora_for_models(MODELS["sd3"], None, lora, 1.0, 0.0, lora_metadata=metadata)
    copy = folder / "student.safetensors"
    save_file(comfy.utils.load_torch_file(PATHS["sd3"]), copy, described)
    models = {"lora": with_lora, "checkpoint": comfy.sd.load_diffusion_model(str(copy)), "neither": MODELS["sd3"]}
    presets = {name: sampling.TurboPreset.execute(m, "auto", 0, 1.0, "snap").result for name, m in models.items()}
    return {name: outputs[0].tolist() for name, outputs in presets.items()}


CHECKS = [
    families,
    item_alone_equals_item_in_batch,
    item_alone_in_core,
    select_in_custom_sampler,
    same_as_core_samplers,
    forwards_and_progress,
    inpainting,
    denoise_in_core,
    denoise_in_ours,
    lists_of_the_host,
    presets_on_the_host,
    doctor_on_the_host,
    mistakes,
    metadata,
]

if __name__ == "__main__":
    with torch.inference_mode():  # as the host runs nodes
        results = {check.__name__: check() for check in CHECKS}
    (folder / "results.json").write_text(json.dumps(results))
