"""Runs inside the host's Python: models of the host as backends to train on.  probe_training.py FOLDER

Each function measures one thing and returns what JSON can hold; test_comfy_denoiser.py says what it must be. FOLDER
receives LoRAs with the student's output, too, for diffusers.
"""

from host_tools import (
    DIRECT,
    OneBatch,
    Warnings,
    a_lora,
    a_run,
    excite,
    folder,
    host_denoised,
    latents,
    load,
    relative,
    write,
)

# isort: split
import gc
import weakref
from dataclasses import replace

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import comfy_extras.nodes_model_advanced as core_models
import comfy_extras.nodes_train as core_train
import tiny_models
import torch
from pack.distill_core.data.dataset import Batch
from pack.distill_core.diffusion.schedules import grid_sigmas
from pack.distill_core.discriminators.latent import LatentDiscriminator
from pack.distill_core.methods.ladd import LADD
from pack.distill_core.models.denoiser import Denoiser, cat_conds
from pack.distill_core.training.loop import Run, TrainConfig, training_step
from pack.nodes import mini
from pack.nodes.host.backend import training_backend
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode


def patched(family: str):
    """MODEL variants that other nodes make: what was done -> (MODEL, CONDITIONING)."""
    model, positive = load(family), tiny_models.conditioning(family)
    variants = {"plain": (model, positive)}
    with torch.inference_mode():
        lora = {
            name: value.clone() for name, value in a_lora(family, model).items()
        }  # inference tensors, as loaders give
        variants["with a lora"] = (comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0], positive)
        if family == "sd3":
            variants["another time scale"] = (core_models.ModelSamplingAuraFlow().patch_aura(model, 1.7)[0], positive)
        if family == "sd15":
            zsnr = core_models.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]
            variants["v and zero snr"] = (zsnr, positive)
        if family == "flux":
            guided = [[positive[0][0], {**positive[0][1], "guidance": 7.0}]]
            variants["guidance 7"] = (model, guided)
            reference = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(4))
            variants["a reference latent"] = (
                model,
                [[positive[0][0], {**positive[0][1], "reference_latents": [reference]}]],
            )
        if family == "sdxl":
            sizes = {"width": 768, "height": 512, "crop_w": 8, "crop_h": 0, "target_width": 640, "target_height": 480}
            variants["sizes"] = (model, [[positive[0][0], {**positive[0][1], **sizes}]])
    return variants


def same_as_sampling() -> dict:
    """Teacher on the backend against the host's own sampling path, relative."""
    result = {}
    for family in [*tiny_models.BUILDERS, *DIRECT]:
        plain = None
        for name, (model, positive) in patched(family).items():
            x, time = latents(family), torch.tensor([0.8, 0.3])
            with training_backend(model) as backend, torch.no_grad():
                sigma = backend.process.sigma_at_flow_time(time)
                ours = Denoiser(backend)(x, sigma, backend.cond(positive * 2))
                plain = ours if plain is None else plain
            with torch.inference_mode():
                theirs = host_denoised(model, positive, x, sigma)
            result[f"{family} {name}"] = {"difference": relative(ours, theirs), "from plain": relative(ours, plain)}
    return result


def shift_of_the_teacher() -> dict:
    """The grid a teacher is sampled on is that of the MODEL, with the shift node before it."""
    model = load("flux")
    with torch.inference_mode():
        shifted = core_models.ModelSamplingFlux().patch(model, 1.15, 0.5, 512, 768)[0]
    result = {}
    for name, variant in (("own", model), ("patched", shifted)):
        with training_backend(variant) as backend:
            grid = grid_sigmas(backend.process, 4)[:-1]
            sampling = variant.get_model_object("model_sampling")
            expected = [sampling.percent_to_sigma(k / 4) for k in range(4)]
            result[name] = {"ours": grid.tolist(), "host's": expected}
    return result


def mixed_texts() -> dict:
    """Texts of different lengths in a batch: each row as it is alone, features too, also after joining datasets."""
    result = {}
    for family in ("sd3", "flux", "lumina", "qwen-image", "sd15"):
        model = load(family)
        short, long = tiny_models.conditioning(family), tiny_models.conditioning(family, 2)
        long[0][0] = torch.cat([long[0][0], long[0][0].flip(1)], dim=1)
        x, sigma = latents(family, 3), torch.tensor([0.9, 0.5, 0.7])
        with training_backend(model) as backend, torch.no_grad():
            teacher = Denoiser(backend)
            batch = backend.cond(short + long + short)
            alone = [backend.cond(short), backend.cond(long), backend.cond(short)]
            out, maps = teacher(x, sigma, batch), teacher.features(x, sigma, batch, backend.default_taps())
            answer, beside = teacher.with_features(x, sigma, batch, backend.default_taps())
            joined = teacher(x, sigma, cat_conds(alone))
            rows = [slice(i, i + 1) for i in range(3)]
            single = torch.cat([teacher(x[r], sigma[r], c) for r, c in zip(rows, alone, strict=True)])
            features = [
                teacher.features(x[r], sigma[r], c, backend.default_taps()) for r, c in zip(rows, alone, strict=True)
            ]
            result[family] = {
                "output": relative(out, single),
                "joined": relative(joined, single),
                "features": max(
                    relative(m, torch.cat(s)) for m, s in zip(maps, zip(*features, strict=True), strict=True)
                ),
                "one forward": torch.equal(answer, out) and all(map(torch.equal, maps, beside)),
                "rows": len(batch),
            }
    return result


def features_are_the_image() -> dict:
    """The last tap of each family against what the host's own patch or hook says the image tokens are: they follow the
    latent's position, so a change in one corner moves the map most there."""
    result = {}
    for family in [*tiny_models.BUILDERS, *DIRECT]:
        with training_backend(load(family)) as backend, torch.no_grad():
            teacher, cond, x = Denoiser(backend), backend.cond(tiny_models.conditioning(family)), latents(family, 1)
            sigma = backend.process.sigma_at_flow_time(torch.tensor([0.5]))
            changed = x.clone()
            changed[..., -2:, :2] += 3.0
            tap = backend.tap_names[:1]
            (before,), (after,) = (teacher.features(v, sigma, cond, tap) for v in (x, changed))
            moved = (after - before).abs().mean((0, 1))
            place = moved.flatten().argmax().item()
            result[family] = {"shape": list(before.shape), "corner": [place // moved.shape[1], place % moved.shape[1]]}
    return result


def features_beside_a_reference() -> dict:
    """The same with reference latents in the sequence: what differs is still where the latents differ."""
    result = {}
    for family in ("flux", "flux2", "qwen-image"):
        with training_backend(load(family)) as backend, torch.no_grad():
            text, options = tiny_models.conditioning(family)[0]
            reference = torch.randn(tiny_models.empty_latent(family).shape, generator=torch.Generator().manual_seed(4))
            cond = backend.cond([[text, {**options, "reference_latents": [reference]}]])
            x, sigma = latents(family, 1), backend.process.sigma_at_flow_time(torch.tensor([0.5]))
            changed = x.clone()
            changed[..., -2:, :2] += 3.0
            last = backend.tap_names[-1:]
            (before,), (after,) = (Denoiser(backend).features(v, sigma, cond, last) for v in (x, changed))
            (alone,) = Denoiser(backend).features(x, sigma, backend.cond([[text, options]]), last)
            moved = (after - before).abs().mean((0, 1))
            place = moved.flatten().argmax().item()
            result[family] = {
                "shape": list(before.shape),
                "corner": [place // moved.shape[1], place % moved.shape[1]],
                "effect": relative(before, alone),
            }
    return result


def counted(forward, calls: dict, name: str):
    """The forward of a layer that counts its calls; unlike a hook, also those of a recompute."""

    def run(*args):
        calls[name] += 1
        return forward(*args)

    return run


def forwards_of_a_step() -> dict:
    """How often each block of the mini model runs in one step of the loop, without and with checkpointing."""
    result = {}
    with torch.inference_mode():
        model = mini.LoadMiniModel.execute(False)[0]
    positive = tiny_models.conditioning("sd3")
    for checkpointing in (False, True):
        with training_backend(model, checkpointing) as backend:
            run, calls = a_run(backend, positive, latents("sd3", 2)), dict.fromkeys(backend.tap_names, 0)
            run.method.taps = backend.tap_names[:2]
            run.method.discriminator.heads = run.method.discriminator.heads[:2]

            for name in calls:
                mlp = backend.network.get_submodule(name).x_block.mlp
                mlp.forward = counted(mlp.forward, calls, name)
            training_step(run)
            result["checkpointed" if checkpointing else "plain"] = list(calls.values())
    return result


def flops_of_a_step() -> float:
    """A step of the loop in forwards of the backbone, on the network and batch of benchmarks/step_flops.py."""
    model, channels = tiny_models.deep_sd3(blocks=12, width=256), 16
    positive = [[torch.randn(1, 16, 256), {"pooled_output": torch.randn(1, 64)}]]
    x = torch.randn(2, channels, 16, 16)
    with training_backend(model, checkpointing=False) as backend:
        teacher, student = Denoiser(backend), Denoiser(backend, backend.new_lora(8))
        taps = [f"joint_blocks.{i}" for i in (2, 5, 8)]
        dataset = OneBatch(Batch(x, backend.cond(positive * 2)))
        method = LADD(student, teacher, LatentDiscriminator.for_teacher(teacher, taps, dataset.content), taps=taps)
        run = Run(method, dataset, TrainConfig(batch_size=2))
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            teacher(x, torch.ones(2), dataset.content.cond)
        with FlopCounterMode(display=False) as step:
            training_step(run)
    return step.get_total_flops() / forward.get_total_flops()


def one_copy() -> dict:
    """Networks and parameters while a model is trained on: beside MODEL's own there is one, of MODEL's size."""
    network = type(load("sd3").model.diffusion_model)
    gc.collect()
    model = load("sd3")

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is network for thing in gc.get_objects())

    before, size = alive(), sum(p.numel() for p in model.model.diffusion_model.parameters())
    with training_backend(model) as backend:
        run = a_run(backend, tiny_models.conditioning("sd3"), latents("sd3"))
        training_step(run)
        during = alive()
        held = sum(p.numel() for p in backend.network.parameters())
        teacher, student = run.method.teacher.backend.network, run.method.student.backend.network
        shared = teacher is student is backend.network
        watched = weakref.ref(backend.network)
        loaded = len(comfy.model_management.current_loaded_models)
    del run, backend, teacher, student
    gc.collect()
    return {
        "more networks": during - before,
        "size": held / size,
        "shared": shared,
        "gone": watched() is None,
        "loaded during": loaded,
        "loaded after": len(comfy.model_management.current_loaded_models),
    }


def state(model) -> dict:
    """All that other nodes see of a MODEL and of the host."""
    weights = model.model.state_dict()
    return {
        "weights": {name: (value.data_ptr(), value.double().sum().item()) for name, value in weights.items()},
        "patches": (model.patches_uuid, len(model.patches), sorted(model.object_patches), sorted(model.backup)),
        "options": repr(model.model_options),
        "hooks": sum(len(m._forward_hooks) + ("forward" in m.__dict__) for m in model.model.modules()),
        "sampling": id(model.get_model_object("model_sampling")),
        "gradients": [n for n, p in model.model.named_parameters() if p.requires_grad or p.grad is not None],
        "host": (comfy.model_management.in_training, comfy.model_management.training_fp8_bwd),
        "modes": (torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
    }


def nothing_leaks() -> dict:
    """Names of what differs afterwards: after a run, and after one that broke in the middle of a step."""
    result = {}
    for family in ("sd3", "flux", "sd15", "lumina"):
        model, positive = load(family), tiny_models.conditioning(family)
        with torch.inference_mode():
            lora = {name: value.clone() for name, value in a_lora(family, model).items()}
            model = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0]
            x, sigma = latents(family), torch.tensor([0.8, 0.3])
            for ending in ("finished", "broken"):
                image, before = host_denoised(model, positive, x, sigma), state(model)
                try:
                    with training_backend(model) as backend:
                        run = a_run(backend, positive, latents(family))
                        training_step(run)
                        if ending == "broken":
                            raise KeyboardInterrupt
                except KeyboardInterrupt:
                    pass
                after = state(model)
                changed = [name for name in before if before[name] != after[name]]
                again = host_denoised(model, positive, x, sigma)
                result[f"{family} {ending}"] = {"changed": changed, "same image": torch.equal(image, again)}
    return result


def without_a_loader() -> dict:
    """A MODEL whose loader the host cannot ask again, patched by another clone at that moment."""
    model = load("sd3")
    lora = a_lora("sd3", model)
    model.cached_patcher_init = None
    positive, x, sigma = tiny_models.conditioning("sd3"), latents("sd3"), torch.tensor([0.8, 0.3])
    with torch.inference_mode():
        lora = {name: value.clone() for name, value in lora.items()}
        with_lora = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        expected, patched = host_denoised(model, positive, x, sigma), host_denoised(with_lora, positive, x, sigma)
        in_memory = sorted(with_lora.backup) != []
        result = {}
        for name, variant, image in (("plain", model, expected), ("with a lora", with_lora, patched)):
            with training_backend(variant) as backend:
                with torch.no_grad():
                    ours = Denoiser(backend)(x, sigma, backend.cond(positive * 2))
                inference = sum(p.is_inference() for p in backend.network.parameters())
                training_step(a_run(backend, positive, x))
            result[name] = {"difference": relative(ours, image), "inference tensors": inference}
        again = host_denoised(with_lora, positive, x, sigma)
    return {**result, "patched at that moment": in_memory, "same afterwards": torch.equal(again, patched)}


def diffusers_weights(family: str, table) -> dict[str, torch.Tensor]:
    """The tiny network's weights under diffusers' names, by the host's own table."""
    inner = load(family).model
    state, weights = inner.diffusion_model.state_dict(), {}
    for name, to in table(inner.model_config.unet_config).items():
        source, rows, reorder = (*(to if isinstance(to, tuple) else (to,)), None, None)[:3]
        if source in state:
            value = state[source] if rows is None else state[source].narrow(*rows)
            weights[name] = (reorder(value) if reorder else value).clone().contiguous()
    return weights


def exported_loras() -> dict:
    """The student on the backend against MODEL with the exported LoRA, through core's two ways of loading one."""
    result = {}
    for family in [*tiny_models.BUILDERS, *DIRECT, "mini"]:
        if family == "mini":
            with torch.inference_mode():
                model = mini.LoadMiniModel.execute(False)[0]
                positive = mini.MiniConditioning.execute("bag")[0][0]
            x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        else:
            model, positive, x = load(family), tiny_models.conditioning(family), latents(family)
        with training_backend(model) as backend:
            path = backend.new_lora(3)
            excite(path)
            sigma = backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.3]))
            with torch.no_grad():
                cond = backend.cond(positive * 2)
                ours, teacher = Denoiser(backend, path)(x, sigma, cond), Denoiser(backend)(x, sigma, cond)
            lora = backend.export(path)
        save_file(lora, folder / f"lora_{family}.safetensors")
        with torch.inference_mode(), Warnings() as warnings:
            file = comfy.utils.load_torch_file(str(folder / f"lora_{family}.safetensors"), safe_load=True)
            loaded, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
            as_model = core_train.LoraModelLoader.execute(model, lora, 1.0)[0]
            images = [host_denoised(m, positive, x, sigma) for m in (loaded, as_model)]
        result[family] = {
            "difference": max((image - ours).abs().max().item() for image in images),
            "effect": relative(ours, teacher),
            "warnings": warnings.texts,
            "keys": sorted(lora)[:4],
        }
        if family in ("mini", "flux-schnell", "sdxl"):
            both = {
                "x": x,
                "sigma": sigma,
                "context": cond.context,
                "pooled": cond.pooled,
                "denoised": ours,
                "teacher": teacher,
            }
            save_file(
                {name: value.contiguous() for name, value in both.items()}, folder / f"student_{family}.safetensors"
            )
    save_file(
        diffusers_weights("flux-schnell", comfy.utils.flux_to_diffusers), folder / "flux-schnell_diffusers.safetensors"
    )
    save_file(diffusers_weights("sdxl", comfy.utils.unet_to_diffusers), folder / "sdxl_diffusers.safetensors")
    return result


def latent_spaces() -> dict:
    """Host latents in and out: the host's scaling exactly once."""
    result = {}
    for family in tiny_models.BUILDERS:
        model = load(family)
        with torch.inference_mode():
            samples = torch.randn(2, *tiny_models.empty_latent(family).shape[1:])
        with training_backend(model) as backend:
            inside = backend.latents_in(samples)
            expected = model.model.process_latent_in(samples.clone())
            back = backend.latents_out(inside)
            result[family] = {
                "ndim": inside.ndim,
                "in": relative(inside.reshape(expected.shape), expected),
                "out": relative(back, samples.clone()),
                "shape": list(back.shape) == list(samples.shape),
                "inference": inside.is_inference(),
                "scaled": relative(inside.reshape(samples.shape), samples.clone()),
            }
    return result


def quantized(backend):
    """The backend with one layer quantized."""
    layer = backend.network.get_submodule("joint_blocks.0.x_block.mlp.fc1")
    weight = comfy.ops.QuantizedTensor.from_float(layer.weight.detach(), "TensorCoreFP8Layout")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return backend


def mistakes() -> dict:
    """What is said to a user who connects the wrong thing."""
    with training_backend(load("sd3")) as backend:
        positive = tiny_models.conditioning("sd3")

        def said(function) -> str:
            try:
                function()
            except ValueError as error:
                return str(error)
            return "accepted"

        with_control = [[positive[0][0], {**positive[0][1], "control": object()}]]
        no_pooled = backend.cond([[positive[0][0], {}]])
        x, sigma = latents("sd3", 1), torch.tensor([0.5])
        no_layers = replace(backend.architecture, lora_under=("nothing",))  # quantized layers are not linear layers
        half = backend.cond(positive), backend.cond([[positive[0][0], {}]])
        result = {
            "controlnet": said(lambda: backend.cond(with_control)),
            "empty conditioning": said(lambda: backend.cond([])),
            "no pooled": said(lambda: Denoiser(backend)(x, sigma, no_pooled)),
            "unlike conditionings": said(lambda: cat_conds(half)),
            "quantized": said(lambda: setattr(backend, "architecture", no_layers) or backend.new_lora(2)),
            "quantized, all weights": said(lambda: quantized(backend).trainable_copy()),
            "other channels": said(lambda: backend.latents_in(torch.zeros(1, 4, 8, 8))),
        }

        masked = [[positive[0][0], {**positive[0][1], "mask": torch.ones(1, 64, 64), "mask_strength": 1.0}]]
        result["mask"] = said(lambda: backend.cond(masked))
    with training_backend(load("wan")) as backend:
        result["video"] = said(lambda: backend.latents_in(torch.zeros(1, 16, 5, 8, 8)))
        text, options = tiny_models.conditioning("wan")[0]
        reference = backend.cond([[text, {**options, "reference_latents": [torch.zeros(1, 16, 1, 8, 8)]}]])
        taps, wan_latents = backend.default_taps(), latents("wan", 1)
        result["reference before the image"] = said(
            lambda: Denoiser(backend).features(wan_latents, torch.tensor([0.5]), reference, taps)
        )

    def enter(model) -> None:
        with training_backend(model):
            pass

    unknown = load("sd3")
    unknown.model.diffusion_model.__class__ = type("HunYuanDiT", (type(unknown.model.diffusion_model),), {})
    result["unknown network"] = said(lambda: enter(unknown))
    with torch.inference_mode():
        x0 = core_models.ModelSamplingDiscrete().patch(load("sd15"), "x0", False)[0]
    result["unknown sampling"] = said(lambda: enter(x0))
    return result


if __name__ == "__main__":
    write(
        "training",
        [
            same_as_sampling,
            shift_of_the_teacher,
            mixed_texts,
            features_are_the_image,
            features_beside_a_reference,
            forwards_of_a_step,
            flops_of_a_step,
            one_copy,
            nothing_leaks,
            without_a_loader,
            exported_loras,
            latent_spaces,
            mistakes,
        ],
    )
