"""Runs inside the host's Python: trainers whose teacher is another MODEL.  probe_other_teacher.py FOLDER

Each function measures one thing and returns what JSON can hold; test_other_teacher.py says what it must be.
"""

from host_tools import a_lora, excite, folder, host_denoised, latents, load, relative, write

# isort: split
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import comfy.ldm.flux.model
import comfy.sd
import comfy_extras.nodes_model_advanced as core_models
import folder_paths
import tiny_models
import torch
from pack.distill_core.data.cache import CacheConfig, write_shards
from pack.distill_core.digests import fingerprint
from pack.distill_core.lora_files import read_lora
from pack.distill_core.models.denoiser import Denoiser, cat_conds
from pack.distill_core.training.loop import Run, training_step
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.run_folder import RunFolder
from pack.nodes.host.backend import training_backend
from pack.nodes.host.datasets import training_conditionings
from pack.nodes.host.folders import dataset_folder, lora_file, run_folder
from pack.nodes.host.identity import identity
from pack.nodes.host.other_teacher import open_teacher
from pack.nodes.host.plan import plan_of
from pack.nodes.host.training import describe, open_run, train_in_graph
from pack.nodes.trainers.dmd2 import DMD2Trainer
from pack.nodes.trainers.ladd import LADDTrainer
from probe_gradients import Sums, derivative_error, in_double
from safetensors.torch import save_file

WIDER = dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3)
OTHERS = {"another checkpoint": {}, "another size": WIDER, "other texts": {"context_in_dim": 32}}
TEACHERS = ("a LoRA", "another checkpoint", "another size")
TRAINERS = {"LADD": (LADDTrainer, {"distillation_weight": 2.5}), "DMD2": (DMD2Trainer, {"fake_score_updates": 1})}
WIDGETS = dict(target_steps=2, steps=2, batch_size=2, rank=2, student_lr=1e-2, teacher_cfg=2.0)


def write_another(name: str, **settings) -> str:
    """A file of FLUX's type with weights of its own."""
    network = comfy.ldm.flux.model.Flux(**{**tiny_models.FLUX, "guidance_embed": True, **settings}, **tiny_models.OPS)
    path = folder / f"{name}.safetensors"
    save_file({key: value.flip(0).clone() for key, value in tiny_models.random_state(network).items()}, path)
    return str(path)


@cache
def model(name: str):
    """The MODELs, each made once, as nodes give them."""
    with torch.inference_mode():
        if name in OTHERS:
            return comfy.sd.load_diffusion_model(write_another(name, **OTHERS[name]))
        if name == "a LoRA":
            lora = {key: value.clone() for key, value in a_lora("flux", model("flux")).items()}
            return comfy.sd.load_lora_for_models(model("flux"), None, lora, 0.7, 0.0)[0]
        if name == "two LoRAs":  # one file after another
            lora = {key: value.clone() for key, value in a_lora("flux", model("flux"), 4).items()}
            return comfy.sd.load_lora_for_models(model("a LoRA"), None, lora, 1.0, 0.0)[0]
        if name == "shifted":  # other levels on a grid, and the same answer at each
            return core_models.ModelSamplingFlux().patch(model("flux"), 1.15, 0.5, 512, 768)[0]
        if name == "differences":  # no LoRA: merged into the weights of a copy
            weight = "diffusion_model.img_in.weight"
            other = model("flux").clone()
            other.add_patches({weight: (torch.full((128, 64), 0.01),)}, 1.0)
            return other
        return load(name)


def pictures():
    """The folder of four latents with a text each, as Latents Dataset gives them."""
    made = dataset_folder("pictures")
    if made.exists():
        return made
    texts = [tiny_models.conditioning("flux", seed) for seed in range(4)]
    conds, uncond, description = training_conditionings(model("flux"), texts, None)
    found = latents("flux", 4, seed=7)

    def make(items, shard) -> dict[str, torch.Tensor]:
        return {"latents": found[list(items)], **cat_conds([conds[i] for i in items]).tensors()}

    config = CacheConfig(count=4, sizes=(tuple(found.shape[2:]),), guidance=1.0)
    for _ in write_shards(make, uncond, 1.0, config, made, {"family": description["family"]}):
        pass
    return made


def request(teacher: str, method: str = "LADD", student: str = "flux", train: dict | None = None, **widgets):
    trainer, own = TRAINERS[method]
    name = f"{method}_{teacher}".replace(" ", "_")
    given = WIDGETS | own | {"run_name": name} | widgets
    return trainer.request(
        model=model(student),
        dataset=pictures(),
        settings={TrainConfig: {"preflight": False, **(train or {})}},
        teacher_model=model(teacher),
        **given,
    )


@contextmanager
def opened(asked) -> Iterator[Run]:
    """The run before its first step, on its own copies."""
    data, config = describe(asked)
    place = RunFolder(run_folder(asked.run_name))
    with (
        training_backend(asked.model, asked.checkpointing) as backend,
        open_teacher(asked, backend, place.path) as teacher,
    ):
        yield open_run(asked, config, data, backend, place, teacher)


def steps() -> dict:
    """What teaches, and whom two steps change."""
    result = {}
    for name in (*TEACHERS, "two LoRAs"):
        with opened(request(name)) as run:
            method, sample = run.method, run.batch(0)[0]
            teacher, student = method.teacher, method.student
            networks = [student.backend.network, teacher.backend.network]
            before = [fingerprint(network) for network in networks]
            sigma = teacher.process.sigma_at_flow_time(torch.tensor([0.8, 0.3]))
            with torch.no_grad():
                ours = teacher(sample.latents, sigma, sample.cond)
                plain = Denoiser(student.backend)(sample.latents, sigma, sample.cond)
                maps = teacher.features(sample.latents, sigma, sample.cond, method.taps)
            for _ in range(2):
                training_step(run)
            held = [value for part in (*networks, teacher.lora) if part is not None for value in part.parameters()]
            result[name] = {
                "name": teacher.name,
                "one network": networks[0] is networks[1],
                "frozen": before == [fingerprint(network) for network in networks],
                "gradients elsewhere": sum(value.grad is not None for value in held),
                "trained": max(up.abs().max().item() for up in student.lora.up),
                "channels": [one.shape[1] for one in maps],
                "taps": list(method.taps),
            }
        texts = [tiny_models.conditioning("flux", seed) for seed in range(4)]
        rows = [next(t for t in texts if torch.equal(t[0][0], context[None])) for context in sample.cond.context]
        with torch.inference_mode():
            theirs = [host_denoised(model(name), text, sample.latents[[i]], sigma[[i]]) for i, text in enumerate(rows)]
        result[name] |= {"difference": relative(ours, torch.cat(theirs)), "effect": relative(ours, plain)}
    return result


def gradients() -> dict:
    """Error of the student's gradient through re-noising and the teacher's answer and features, in float64."""
    result = {}
    for name in TEACHERS:
        for checkpointing in (False, True):
            with opened(request(name, gradient_checkpointing=checkpointing)) as run:
                student, teacher, sample = run.method.student, run.method.teacher, run.batch(0)[0]
                for part in (student.backend.network, teacher.backend.network):
                    in_double(part)
                for lora in filter(None, (student.lora, teacher.lora)):
                    lora.double()
                excite(student.lora)
                x, cond, sums = sample.latents.double(), sample.cond.to(dtype=torch.float64), Sums()
                noise = latents("flux", len(x), seed=1).double()
                sigma = teacher.process.sigma_at_flow_time(torch.tensor([0.8, 0.6]).double())

                def loss(student=student, teacher=teacher, x=x, noise=noise, cond=cond, sigma=sigma, sums=sums):
                    fake = student(x, sigma, cond)
                    renoised = teacher.process.noise_scaling(sigma * 0.7, noise, fake)
                    return sums(
                        [
                            teacher(renoised, sigma * 0.7, cond),
                            *teacher.features(renoised, sigma * 0.7, cond, teacher.backend.tap_names),
                        ]
                    )

                key = f"{name} {'checkpointed' if checkpointing else 'plain'}"
                result[key] = derivative_error(loss, list(student.lora.parameters()))
    return result


def runs() -> dict:
    """Runs to their ends, what they leave, and what another teacher is told."""
    result = {}
    for method in TRAINERS:
        for name in TEACHERS:
            asked = request(name, method)
            train_in_graph(asked)
            place = RunFolder(run_folder(asked.run_name))
            said = read_lora(lora_file(asked.run_name))[1]
            result[f"{method} {name}"] = {
                "report": json.loads(place.report.read_text())["request"]["teacher"] == identity(model(name)),
                "file": said["config"]["teacher"] == identity(model(name)),
                "name": said["teacher"],
                "started": place.started()["teacher"],
                "steps": len(place.logs()),
                "losses": sorted(set(place.logs()[-1]) & {"adversarial", "distillation", "distribution_matching"}),
            }
    again = dict(run_name="LADD_a_LoRA", steps=4)
    result["another teacher"] = refused(lambda: train_in_graph(request("another size", **again)))
    return result


def offloaded() -> dict:
    """How far students are from those of `runs` where both networks' blocks are away between their runs."""
    result = {}
    for tier in ("ram", "file"):
        name = f"offload_{tier}"
        train_in_graph(request("another size", run_name=name, train={"offload": tier}))
        ours, theirs = (read_lora(lora_file(run))[0] for run in (name, "LADD_another_size"))
        result[tier] = max((ours[key] - theirs[key]).abs().max().item() for key in theirs)
    return result


def refused(attempt) -> str:
    """The message with which an attempt is refused, empty where it is not."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def mistakes() -> dict:
    """Teachers that cannot teach this model: what is said, before a step is done."""
    found = {}
    for name in ("sd15", "other texts", "flux2"):
        asked = request(name, run_name=f"mistake_{name}".replace(" ", "_"))
        found[name] = refused(lambda asked=asked: train_in_graph(asked))
        found[f"{name} steps"] = len(RunFolder(run_folder(asked.run_name)).logs())
    bound = model("flux").clone()
    bound.add_object_patch("concat_latent_image", torch.nn.Identity())
    asked = request("flux", run_name="mistake_bound")
    object.__setattr__(asked, "teacher", bound)
    return found | {"bound": refused(lambda: train_in_graph(asked))}


def the_model_itself() -> dict:
    """Who is no other teacher, and whose LoRAs need a network of their own."""
    asked = {name: request(name) for name in ("flux", "shifted", "differences", "a LoRA")}
    result = {name: each.other_teacher is None for name, each in asked.items()}
    with opened(asked["differences"]) as run:
        result["differences have a network"] = run.method.teacher.backend is not run.method.student.backend
    below = request("flux", student="a LoRA")  # the model has a LoRA that the teacher lacks
    with opened(below) as run:
        result["without has a network"] = run.method.teacher.backend is not run.method.student.backend
    with opened(request("two LoRAs", student="a LoRA")) as run:
        result["the second alone"] = run.method.teacher.backend is run.method.student.backend
    return result


def plans() -> dict:
    """Bytes of the models in the plan of a step: alone, and with each teacher."""
    result = {}
    for name in ("flux", *TEACHERS):
        asked = request(name)
        data, config = describe(asked)
        result[name] = plan_of(asked, config, data).parts["model"]
    result["weights"] = {
        name: sum(p.numel() * p.element_size() for p in model(name).model.diffusion_model.parameters())
        for name in ("flux", "another size")
    }
    return result


folder_paths.set_output_directory(str(folder))
with torch.inference_mode():
    write("other_teacher", [steps, gradients, runs, offloaded, mistakes, the_model_itself, plans])
