"""Runs inside the host's Python: tiny networks trained on pairs for two steps.  probe_dpo.py FOLDER

Prints JSON; test_dpo_trainer.py says what it must be.
"""

from host_tools import Warnings, folder, host_denoised, latents, load, relative

# isort: split
import json

import folder_paths
import tiny_models
import torch
from pack.distill_core.data.cache import CacheConfig, write_shards
from pack.distill_core.lora_files import read_lora
from pack.distill_core.models.denoiser import cat_conds
from pack.distill_core.models.items import REJECTED
from pack.distill_core.presets.recipe import make_recipe
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.run_folder import RunFolder
from pack.nodes.host.datasets import training_conditionings
from pack.nodes.host.folders import dataset_folder, lora_file, run_folder
from pack.nodes.host.model import facts_of
from pack.nodes.host.results import with_turbo_lora
from pack.nodes.host.training import train_in_graph
from pack.nodes.trainers.dpo import DPOTrainer

NETWORKS = {"sd15": "", "flux": "", "flux-schnell": "auto", "lumina": "auto"}  # the preset of a turbo
WIDGETS = dict(steps=2, batch_size=2, rank=2, student_lr=1e-2)
UNCHECKED = {TrainConfig: {"preflight": False, "retention_every": 0}}  # a random network knows no picture


def pairs(family: str, model):
    """Four pairs of latents with one text, as pictures give them; the folder."""
    conds, uncond, description = training_conditionings(model, [tiny_models.conditioning(family)] * 4, None)
    chosen, rejected = (latents(family, 4, seed=seed) for seed in (7, 8))
    config = CacheConfig(count=4, sizes=(tuple(chosen.shape[2:]),), guidance=1.0)

    def make(items, shard) -> dict[str, torch.Tensor]:
        texts = cat_conds([conds[i] for i in items])
        return {"latents": chosen[list(items)], REJECTED: rejected[list(items)], **texts.tensors()}

    folder, described = dataset_folder(f"pairs_{family}"), {"family": description["family"]}
    for _ in write_shards(make, uncond, 1.0, config, folder, described, [REJECTED]):
        pass
    return folder


def measured(family: str, preset: str) -> dict:
    """Two steps, and what core's loader makes of the file."""
    model, positive, name = load(family), tiny_models.conditioning(family), f"pairs_{family}"
    own = dict(preference_levels="student", preset=preset) if preset else {}
    request = DPOTrainer.request(
        model=model, dataset=pairs(family, model), run_name=name, settings=UNCHECKED, **WIDGETS, **own
    )
    train_in_graph(request)
    state, said = read_lora(lora_file(name))
    logs = RunFolder(run_folder(name)).logs()
    with Warnings() as warnings:
        student = with_turbo_lora(model, lora_file(name))
    x, sigma = latents(family, 1), torch.tensor([0.5])
    before, after = (host_denoised(either, positive, x, sigma) for either in (model, student))
    recipe = make_recipe(facts_of(model), preset, width=96, height=64) if preset else None
    return {
        "first": logs[0]["preference"],
        "accuracy": logs[-1]["implicit_accuracy"],
        "trained": max(v.abs().max().item() for k, v in state.items() if "lora_B" in k or "lora_up" in k),
        "finite": all(torch.isfinite(value).all().item() for value in state.values()),
        "levels": said.get("sigmas"),
        "wanted": recipe and recipe.sigmas[:-1].tolist(),
        "effect": relative(after, before),
        "warnings": warnings.texts,
    }


folder_paths.set_output_directory(str(folder))
with torch.inference_mode():
    print(json.dumps({family: measured(family, preset) for family, preset in NETWORKS.items()}))
