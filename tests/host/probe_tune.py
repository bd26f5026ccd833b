"""Runs inside the host's Python: tiny turbos tuned for two steps.  probe_tune.py FOLDER

Prints JSON; test_tune.py says what it must be.
"""

from host_tools import DIRECT, folder, host_denoised, latents, load, relative

# isort: split
import json

import folder_paths
import tiny_models
import torch
from pack.distill_core.data.dataset import LatentDataset
from pack.distill_core.diffusion.noise import ItemNoise
from pack.distill_core.lora_files import read_lora
from pack.distill_core.presets.recipe import make_recipe
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.run_folder import RunFolder
from pack.nodes.host.datasets import make_image_dataset
from pack.nodes.host.folders import lora_file, run_folder
from pack.nodes.host.model import facts_of
from pack.nodes.host.training import train_in_graph
from pack.nodes.trainers.adapter import DeDistilAdapter
from pack.nodes.trainers.tune import TuneTurbo

PRESETS = {"flux-schnell": "auto", "sd15": "lcm-lora", "lumina": "auto"}  # which turbo of its family
WIDGETS = dict(steps=2, batch_size=2, rank=2, keep_count=4, student_lr=1e-3, discriminator_lr=1e-3)
UNCHECKED = {TrainConfig: {"preflight": False, "retention_every": 0}}  # a random network knows no picture


def own_pictures(family: str, model):
    """Three latents with captions, as an encoder would give them."""
    pictures = model.model.process_latent_out(latents(family, 3, seed=7))
    return make_image_dataset(model, [{"samples": pictures}], [tiny_models.conditioning(family)], f"own_{family}")


def path_error(model, dataset: LatentDataset, sampler: str, positive: list) -> float:
    """How far the stored states, and the latent at the end, are from what the sampler makes of the state before."""
    batch = dataset.read(next(iter(dataset.buckets.values()))[:2])
    levels, errors = [*dataset.state_sigmas, 0.0], []
    random = ItemNoise(0, range(2), "kept")
    noise = random.normal(*batch.latents.shape[1:])
    process = model.get_model_object("model_sampling")
    for index, (sigma, lower) in enumerate(zip(levels, levels[1:], strict=False)):
        x = batch.states[:, index]
        answer = host_denoised(model, positive, x, torch.full((2,), sigma))
        if sampler == "euler":
            expected = x + (x - answer) / sigma * (lower - sigma)
        else:  # renoise: the answer with fresh noise
            fresh = random.normal(*batch.latents.shape[1:]) if lower else torch.zeros_like(noise)
            expected = process.noise_scaling(torch.tensor(lower), fresh, answer) if lower else answer
        reached = batch.states[:, index + 1] if lower else batch.latents
        errors.append(relative(reached, expected))
    return max(errors)


def measured(family: str) -> dict:
    model, positive = load(family), tiny_models.conditioning(family)
    own = own_pictures(family, model)
    recipe = make_recipe(facts_of(model), PRESETS[family], width=96, height=64)
    shared = dict(model=model, preset=PRESETS[family], settings=UNCHECKED, **WIDGETS)
    request = TuneTurbo.request(
        dataset=own, run_name=f"tuned_{family}", keep_positive=[positive], adversarial_weight=0.1, **shared
    )
    train_in_graph(request)
    state, said = read_lora(lora_file(f"tuned_{family}"))
    logs = RunFolder(run_folder(f"tuned_{family}")).logs()
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    adapter = DeDistilAdapter.request(
        run_name=f"adapter_{family}", positive=[positive], sizes=f"{12 * scale}x{8 * scale}", **shared
    )
    train_in_graph(adapter)
    of_adapter, _ = read_lora(lora_file(f"adapter_{family}"))
    up = lambda tensors: max(v.abs().max().item() for k, v in tensors.items() if "lora_B" in k or "lora_up" in k)  # noqa: E731
    return {
        "levels": said["sigmas"],
        "preset": recipe.sigmas[:-1].tolist(),
        "sampler": said["sampler"],
        "cfg": said["cfg"],
        "terms": sorted({name for entry in logs for name in entry}),
        "trained": up(state),
        "finite": all(torch.isfinite(value).all().item() for value in state.values()),
        "path": path_error(model, LatentDataset(request.kept.folder), said["sampler"], positive),
        "adapter": up(of_adapter),
        "adapter terms": [name for name in adapter.method.terms if adapter.method.weight(name)],
    }


assert "lumina" in DIRECT
folder_paths.set_output_directory(str(folder))
with torch.inference_mode():
    print(json.dumps({family: measured(family) for family in PRESETS}))
