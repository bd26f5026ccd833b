"""Runs inside the host's Python: Turbo Sampler beside core's euler, same noise, on models that something is patched on.

probe_patches.py FOLDER
"""

from as_host import folder

# isort: split
import json

import comfy.controlnet
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_nag as nag
import tiny_models
import torch
from pack.distill_core.diffusion.noise import ItemNoise
from pack.nodes import sampling
from pack.nodes.host import model as host_model
from pack.nodes.host import sampling as host_sampling
from pack.nodes.host.variety import AIDS, FirstStep
from pack.nodes.variety import SeedVariety

IMAGES = 3
FAMILIES = ("sd3", "flux-schnell", "flux2", "sd15")
MODELS = {family: comfy.sd.load_diffusion_model(tiny_models.write(family, folder)) for family in FAMILIES}
SIGMAS = {"sd15": [14.61, 4.08, 1.61, 0.69, 0.0]}


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals come from the latents, row by row; its network is left out."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        strength = x_noisy[:, 0, 0, 0] / x_noisy.flatten(1).std(1)
        if self.family == "sd15":
            return {"output": [strength.reshape(-1, 1, 1, 1).expand(-1, 320, *x_noisy.shape[2:])]}
        tokens = x_noisy.shape[2] * x_noisy.shape[3] // 4
        residual = [strength.reshape(-1, 1, 1) * torch.linspace(-1, 1, 128).expand(len(x_noisy), tokens, 128)]
        return {"input": residual, "output": []} if self.family == "flux-schnell" else {"output": residual}


def with_options(conditioning: list, **options) -> list:
    return [[context, {**old, **options}] for context, old in conditioning]


def normalized_attention(family, model, positive, negative, rows):
    return nag.NAGuidance.execute(model, 5.0, 0.5, 1.5)[0], positive, negative


def reads_the_negative(family, model, positive, negative, rows):
    model = model.clone()
    push = lambda args: args["denoised"] + 0.3 * (args["cond_denoised"] - args["uncond_denoised"])  # noqa: E731
    model.set_model_sampler_post_cfg_function(push, disable_cfg1_optimization=True)
    return model, positive, negative


def embedding_a_row(family, model, positive, negative, rows):
    """As IP-Adapter does with a batch of pictures: row i of an embedding is for image i; the part is looked up."""
    embeds = ItemNoise(9, range(IMAGES)).normal(1, 320)

    def patch(out, extra):
        part = extra.get("ad_params") or {}
        chosen = embeds[part["sub_idxs"]] if len(out) < IMAGES and part else embeds[rows]
        return out + 0.1 * chosen.repeat(len(out) // len(chosen), 1, 1)

    return _attention_patch(model, patch), positive, negative


def whole_batch(family, model, positive, negative, rows):
    """The same without looking the part up: it only works with the whole batch."""
    embeds = ItemNoise(9, range(IMAGES)).normal(1, 320)[rows]
    return (
        _attention_patch(model, lambda out, extra: out + 0.1 * embeds.repeat(len(out) // len(embeds), 1, 1)),
        positive,
        negative,
    )


def mixes_images(family, model, positive, negative, rows):
    """Every image sees the mean of all: attention over frames, style sharing."""
    return _attention_patch(model, lambda out, extra: 0.5 * (out + out.mean(0, keepdim=True))), positive, negative


def _attention_patch(model, patch):
    model = model.clone()
    model.set_model_attn2_output_patch(patch)
    return model


def control_residuals(family, model, positive, negative, rows):
    control = dict(control=Residuals(family), control_apply_to_uncond=True)
    return model, with_options(positive, **control), with_options(negative, **control)


def reference_latents(family, model, positive, negative, rows):
    references = [ItemNoise(5, [0]).normal_like(tiny_models.empty_latent(family))]
    return model, with_options(positive, reference_latents=references), negative


def regions(family, model, positive, negative, rows):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    left = with_options(positive, mask=mask, mask_strength=1.0, set_area_to_bounds=False)
    right = with_options(
        tiny_models.conditioning(family, seed=7), mask=1 - mask, mask_strength=0.8, set_area_to_bounds=False
    )
    return model, left + right, negative


CASES = {
    normalized_attention: ("flux-schnell", "flux2", "sd15"),
    reads_the_negative: FAMILIES,
    embedding_a_row: ("sd15",),
    whole_batch: ("sd15",),
    mixes_images: ("sd15",),
    control_residuals: ("sd3", "flux-schnell", "sd15"),
    reference_latents: ("flux2",),
    regions: FAMILIES,
}


def ours(family, model, positive, negative, latent, cfg, sigmas=None):
    choice = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=3, sampler="euler", cfg=cfg)
    choice["sigmas"] = torch.tensor(SIGMAS.get(family, [1.0, 0.9, 0.75, 0.5, 0.0])) if sigmas is None else sigmas
    return sampling.TurboSampler.execute(model, positive, latent, negative=negative, **choice).result[0]["samples"]


def cores(family, model, positive, negative, latent, cfg):
    samples, sigmas = latent["samples"], torch.tensor(SIGMAS.get(family, [1.0, 0.9, 0.75, 0.5, 0.0]))
    noise = ItemNoise(3, latent.get("batch_index", range(len(samples)))).normal_like(samples)
    euler = comfy.samplers.ksampler("euler")
    return comfy.sample.sample_custom(model, noise, cfg, euler, sigmas, positive, negative, samples, seed=3)


def same_as_core() -> dict:
    """Per case, family and cfg: distance to core's result, effect of the patch, image 2 alone and in its batch."""
    result = {}
    for case, families in CASES.items():
        for family in families:
            for cfg in (1.0, 2.0):
                rows = list(range(IMAGES))
                plain = MODELS[family], tiny_models.conditioning(family), tiny_models.conditioning(family, seed=5)
                patched = case(family, *plain, rows)
                alone = case(family, *plain, [2])
                batch = {"samples": tiny_models.empty_latent(family, IMAGES)}
                single = {"samples": tiny_models.empty_latent(family), "batch_index": [2]}
                here, there = (run(family, *patched, batch, cfg) for run in (ours, cores))
                scale = there.abs().max()
                result[f"{case.__name__} {family} {cfg:g}"] = {
                    "from core": ((here - there).abs().max() / scale).item(),
                    "effect": ((there - cores(family, *plain, batch, cfg)).abs().max() / scale).item(),
                    "alone": (here[2:] - ours(family, *alone, single, cfg)).abs().max().item(),
                }
    return result


def noise_scale() -> dict:
    """A host process with a noise scale (HiDream-O1's is 8): our samplers beside core's with the same noise."""
    result = {}
    for scale in (1.0, 8.0):
        model = MODELS["sd3"].clone()
        process = type(host_model.native_sampling(model))(model.model.model_config)
        process.noise_scale = scale
        model.add_object_patch("model_sampling", process)
        latent, sigmas = tiny_models.empty_latent("sd3", 2), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
        positive, start = tiny_models.conditioning("sd3"), ItemNoise(1, range(2)).normal_like(latent)

        def run(sampler):
            args = (model, start, 1.0, sampler, sigmas, positive, positive, latent)  # noqa: B023
            return comfy.sample.sample_custom(*args, seed=3)

        def fresh():
            noise = ItemNoise(4, range(2))
            return lambda sigma, after: noise.normal_like(latent)  # noqa: B023

        core = {
            "renoise": run(comfy.samplers.ksampler("lcm", {"noise_sampler": fresh()})),
            "euler": run(comfy.samplers.ksampler("euler")),
            "ancestral": run(comfy.samplers.ksampler("euler_ancestral", {"noise_sampler": fresh()})),
        }
        # Re-noising from a clean picture at full freshness is what lcm does.
        core |= {"scm": core["renoise"], "tcd": core["renoise"]}
        for name, options in (("renoise", {}), ("euler", {}), ("ancestral", {}), ("scm", {}), ("tcd", {"eta": 1.0})):
            mine = run(host_sampling.host_sampler(name, options, fresh()))
            result[f"{name} {scale:g}"] = ((mine - core[name]).abs().max() / core[name].abs().max()).item()
    return result


def variety() -> dict:
    """Seed Variety per family and aid: its effect, image 2 alone, core's euler behind it, and image to image."""
    result = {}
    for family in FAMILIES:
        plain, positive = MODELS[family], tiny_models.conditioning(family)
        batch = {"samples": tiny_models.empty_latent(family, IMAGES)}
        single = {"samples": tiny_models.empty_latent(family), "batch_index": [2]}
        for aid in AIDS:
            varied = SeedVariety.execute(plain, 1.0, aid).result[0]
            here = ours(family, varied, positive, None, batch, 1.0)
            there = cores(family, varied, positive, positive, batch, 1.0)
            without = ours(family, plain, positive, None, batch, 1.0)
            part = torch.tensor(SIGMAS.get(family, [1.0, 0.9, 0.75, 0.5, 0.0])[2:])
            halves = [ours(family, m, positive, None, batch, 1.0, sigmas=part) for m in (plain, varied)]
            result[f"{family} {aid}"] = {
                "effect": ((here - without).abs().amax((1, 2, 3)) / without.abs().max()).tolist(),
                "alone": (here[2:] - ours(family, varied, positive, None, single, 1.0)).abs().max().item(),
                "from core": ((here - there).abs().max() / there.abs().max()).item(),
                "from a lower level": (halves[0] - halves[1]).abs().max().item(),
                "off": SeedVariety.execute(plain, 0.0, aid).result[0] is plain,
            }
    return result


def variety_of_sdxl() -> dict:
    """Of SDXL's pooled input only the text's part is noised, not the sizes at its end."""
    step = FirstStep(AIDS[0], 1.0, tiny_models.model("sdxl").model)
    pooled = torch.cat([torch.randn(2, 64), torch.ones(2, 6 * 256)], 1)
    x, options = torch.randn(2, 4, 8, 8), {"cond_or_uncond": [0]}
    _, conditions = step._prompts(x, torch.randn(2, 5, 64), {"y": pooled}, options)
    moved = (conditions["y"] - pooled).abs().amax(0)
    return {"text": moved[:64].min().item(), "sizes": moved[64:].max().item()}


if __name__ == "__main__":
    with torch.inference_mode():
        results = {check.__name__: check() for check in (same_as_core, noise_scale, variety, variety_of_sdxl)}
    (folder / "results.json").write_text(json.dumps(results))
