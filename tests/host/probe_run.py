"""Runs inside the host's Python: a training run without a server, for what only shows in its process.

    probe_run.py FOLDER

Prints JSON: what the run left of the host's state, and what happens when memory runs out; test_training.py says what
it must be.
"""

from as_host import folder

# isort: split
import json
import resource
from pathlib import Path

import comfy.model_management
import folder_paths
import psutil
import torch
from pack.nodes import mini
from pack.nodes.host.datasets import make_teacher_latents
from pack.nodes.host.folders import run_folder
from pack.nodes.host.training import advice, train_in_graph
from pack.nodes.trainers.ladd import LADDTrainer

folder_paths.set_output_directory(str(folder))


def conditioning(name: str) -> list:
    return mini.MiniConditioning.execute(name)[0]


def output_of(model) -> torch.Tensor:
    """What the MODEL that other nodes hold computes."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    (context, options), *_ = conditioning("bag")[0]
    sigma = torch.full((2,), 0.7)
    return model.model.apply_model(
        x, sigma, c_crossattn=context.expand(2, -1, -1), y=options["pooled_output"].expand(2, -1)
    )


def request(model, dataset: Path, name: str, **changes):
    settings = dict(target_steps=1, steps=3, batch_size=256, student_lr=6e-4, discriminator_lr=4e-3, rank=4)
    settings |= dict(renoise_mean=0.0, renoise_std=1.0)
    return LADDTrainer.request(model=model, dataset=dataset, run_name=name, **(settings | changes))


def host_state(model) -> dict:
    return {
        "in_training": comfy.model_management.in_training,
        "inference_mode": torch.is_inference_mode_enabled(),
        "loaded": sorted(type(entry.model.model).__name__ for entry in comfy.model_management.current_loaded_models),
        "random": torch.get_rng_state().tolist(),
        "options": repr(sorted(model.model_options)),
        "patches": len(model.patches),
    }


with torch.inference_mode():
    model = mini.LoadMiniModel.execute(False)[0]
    dataset = make_teacher_latents(
        model,
        conditioning("all ten"),
        "probe",
        count=128,
        sizes="64x64",
        steps=2,
        cfg=1.5,
        negative=conditioning("none")[0],
        pairs_for_steps=1,
        batch_size=128,
    )
    before, state = output_of(model), host_state(model)
    student, lora, losses = train_in_graph(request(model, dataset, "whole"))
    after = host_state(model)
    result = {
        "changed": [key for key in state if state[key] != after[key]],
        "output": (output_of(model) - before).abs().max().item(),
        "student": (output_of(student) - before).abs().max().item(),
        "losses": len(losses["loss"]),
    }

    train_in_graph(request(model, dataset, "short", steps=1))
    checkpoint = run_folder("short") / "checkpoint.safetensors"
    kept = checkpoint.read_bytes()
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + (60 << 20), resource.RLIM_INFINITY))
    try:
        train_in_graph(request(model, dataset, "short", gradient_checkpointing=False))  # needs about twice as much
        result["error"] = None
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result["kept"] = checkpoint.read_bytes() == kept
    result["in_training"] = comfy.model_management.in_training
    again = train_in_graph(request(model, dataset, "short"))[1]
    result["resumed"] = all(torch.equal(again[name], lora[name]) for name in lora)
    result["advice on all weights"] = advice(request(model, dataset, "full", train="all weights"))
print(json.dumps(result))
