"""Runs inside the host's Python: networks copied to train all their weights.  probe_copies.py FOLDER

Each function measures one thing and returns what JSON can hold; test_comfy_copies.py says what it must be.
"""

from host_tools import DIRECT, OneBatch, Warnings, a_lora, excite, folder, host_denoised, latents, load, relative, write

# isort: split
import gc
import weakref

import comfy.sd
import comfy.utils
import comfy_extras.nodes_train as core_train
import tiny_models
import torch
from pack.distill_core.data.dataset import Batch
from pack.distill_core.methods.components import Components, DiscriminatorConfig
from pack.distill_core.methods.diffusion2gan import Diffusion2GANConfig
from pack.distill_core.methods.ladd import LADDConfig
from pack.distill_core.methods.registry import new_method
from pack.distill_core.models.denoiser import Denoiser
from pack.distill_core.training.loop import Run, TrainConfig, training_step
from pack.nodes.host.backend import training_backend
from probe_gradients import Sums, derivative_error, in_double
from safetensors.torch import save_file

FAMILIES = [*tiny_models.BUILDERS, *DIRECT]


def with_lora(family: str):
    """A MODEL with a LoRA on it, which its copies must have in their weights."""
    model = load(family)
    with torch.inference_mode():
        lora = {name: value.clone() for name, value in a_lora(family, model).items()}
        return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0]


def example(backend, family: str, rows: int = 2) -> Batch:
    texts = [entry for seed in range(rows) for entry in tiny_models.conditioning(family, seed + 1)]
    return Batch(latents(family, rows), backend.cond(texts))


def same_network() -> dict:
    """The copy computes what the teacher computes, has weights of its own, and nothing of the teacher's hooks."""
    result = {}
    for family in FAMILIES:
        with training_backend(with_lora(family)) as backend:
            batch, sigma = example(backend, family), backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.3]))
            path = backend.new_lora(2)
            excite(path)
            copied = backend.trainable_copy()
            teacher, student = Denoiser(backend), Denoiser(copied)
            with torch.no_grad():
                before, ours = (view(batch.latents, sigma, batch.cond) for view in (teacher, student))
                with backend.switch.on(path):
                    hooked = student(batch.latents, sigma, batch.cond)
                for value in student.trainable().values():
                    value.mul_(1.1)
                after, moved = (view(batch.latents, sigma, batch.cond) for view in (teacher, student))
            mine, theirs = dict(copied.network.named_parameters()), dict(backend.network.named_parameters())
            kept = weakref.ref(copied.network)
            result[family] = {
                "difference": relative(ours, before),
                "moved": relative(moved, ours),
                "teacher as before": torch.equal(before, after),
                "hooked": relative(hooked, ours),
                "frozen": sorted(theirs.keys() - mine.keys()),
                "float32": all(value.dtype == torch.float32 for value in mine.values()),
                "trained": [all(v.requires_grad for v in mine.values()), any(v.requires_grad for v in theirs.values())],
                "shared": any(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine),
            }
        del copied, student, mine, hooked, moved, ours
        gc.collect()
        result[family]["gone"] = kept() is None
    return result


def gradients() -> dict:
    """Family -> error of the gradient of all weights, through the copy and then the teacher's features."""
    result = {}
    for family in FAMILIES:
        for checkpointing in (False, True):
            with training_backend(load(family), checkpointing) as backend:
                copied = backend.trainable_copy()
                in_double(backend.network), in_double(copied.network)
                backend.model.manual_cast_dtype = copied.model.manual_cast_dtype = torch.float64
                student, teacher, batch = Denoiser(copied), Denoiser(backend), example(backend, family)
                x, cond = batch.latents.double(), batch.cond.to(dtype=torch.float64)
                sigma, sums = backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.6]).double()), Sums()

                def loss(student=student, teacher=teacher, x=x, cond=cond, sigma=sigma, sums=sums):
                    fake = student(x, sigma, cond)
                    return sums([fake, *teacher.features(fake, sigma * 0.7, cond, teacher.backend.tap_names)])

                name = f"{family} {'checkpointed' if checkpointing else 'plain'}"
                result[name] = derivative_error(loss, list(student.trainable().values()), 2e-3)
    return result


def precisions() -> dict:
    """A file in another precision is trained in float32: the copy against the teacher, and its gradient."""
    result = {}
    for family in ("sd3", "flux", "sd15", "wan"):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            path = tiny_models.write(family, folder)
            with torch.inference_mode():
                model = comfy.sd.load_diffusion_model(path, {"dtype": dtype})
            with training_backend(model) as backend:
                batch, copied = example(backend, family), backend.trainable_copy()
                sigma = backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.3]))
                with torch.no_grad():
                    teacher = Denoiser(backend)(batch.latents, sigma, batch.cond)
                ours = Denoiser(copied)(batch.latents, sigma, batch.cond)
                ours.square().sum().backward()
                frozen = {str(p.dtype) for p in backend.network.parameters()}
                result[f"{family} {dtype}"] = {
                    "difference": relative(ours.detach(), teacher),
                    "teacher": sorted(frozen),
                    "gradients": {str(p.grad.dtype) for p in copied.network.parameters() if p.grad is not None}
                    == {"torch.float32"},
                }
    return result


def exported_differences() -> dict:
    """A student all of whose weights were trained, against MODEL with its file, through core's two ways of loading."""
    result = {}
    for family in FAMILIES:
        model, positive, x = with_lora(family), tiny_models.conditioning(family), latents(family)
        with training_backend(model) as backend:
            student, teacher = Denoiser(backend.trainable_copy()), Denoiser(backend)
            generator = torch.Generator().manual_seed(4)
            sigma = backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.3]))
            with torch.no_grad():
                for value in student.trainable().values():
                    value.add_(torch.randn(value.shape, generator=generator) * 0.1 * value.std().nan_to_num(0.1))
                cond = backend.cond(positive * 2)
                ours, plain = student(x, sigma, cond), teacher(x, sigma, cond)
            file = student.backend.export(None)
        save_file(file, folder / "differences.safetensors")
        with torch.inference_mode(), Warnings() as warnings:
            read = comfy.utils.load_torch_file(str(folder / "differences.safetensors"), safe_load=True)
            loaded, _ = comfy.sd.load_lora_for_models(model, None, read, 1.0, 0.0)
            as_model = core_train.LoraModelLoader.execute(model, file, 1.0)[0]
            images = [host_denoised(m, positive, x, sigma) for m in (loaded, as_model)]
        result[family] = {
            "difference": max(relative(image, ours) for image in images),
            "effect": relative(ours, plain),
            "warnings": warnings.texts,
            "same": torch.equal(*images),
        }
    return result


def full_step() -> dict:
    """A step of LADD on all weights: whose weights moved."""
    result = {}
    for family in ("sd3", "flux", "sd15", "lumina"):
        model = with_lora(family)
        with training_backend(model) as backend:
            batch = example(backend, family)
            heads = DiscriminatorConfig(width=8, blocks=1)
            method = new_method(LADDConfig(warmup_steps=0), Components(backend), batch, 0, discriminator=heads)
            run = Run(method, OneBatch(batch), TrainConfig(batch_size=2, steps=2))
            frozen = [dict(network.named_parameters()) for network in (backend.network, model.model.diffusion_model)]
            before = [{name: value.clone() for name, value in weights.items()} for weights in frozen]
            mine = {name: value.detach().clone() for name, value in run.student_parameters.items()}
            training_step(run)
            moved = [name for name, value in run.student_parameters.items() if not torch.equal(value, mine[name])]
            same = all(torch.equal(b[n], w[n]) for b, w in zip(before, frozen, strict=True) for n in b)
            gradients = [n for weights in frozen for n, value in weights.items() if value.grad is not None]
        result[family] = {"moved": len(moved) / len(mine), "others as before": same, "their gradients": gradients}
    return result


def diffusion2gan(backend, batch: Batch, critic: str, **settings):
    torch.manual_seed(0)
    config = Diffusion2GANConfig(
        terms={"adversarial": 1.0}, critic=critic, critic_rank=2, r1_every=1, mix_share=0.5, **settings
    )
    return new_method(config, Components(backend), batch, 2, discriminator=DiscriminatorConfig(width=8, blocks=1))


def critics() -> dict:
    """Diffusion2GAN on every family, its critic a copy or a path: what a step gives a gradient, and what it costs."""
    result = {}
    for family in FAMILIES:
        for critic in ("copy", "lora"):
            norms = {}
            for checkpointing in (False, True):
                with training_backend(load(family), checkpointing) as backend:
                    batch = example(backend, family)
                    method = diffusion2gan(backend, batch, critic)
                    run = Run(method, OneBatch(batch), TrainConfig(batch_size=2, steps=2))
                    logs = training_step(run)
                    norms[checkpointing] = [logs["generator_grad_norm"], logs["discriminator_grad_norm"], logs["r1"]]
                    moved = [
                        n for n, p in method.discriminator.named_parameters() if n.startswith("input_convs") and p.any()
                    ]
                    own = method.discriminator.backbone.backend is not backend
            pairs = zip(*norms.values(), strict=True)
            result[f"{family} {critic}"] = {
                "scales": backend_scales(family),
                "input convs": len(moved) // 2,
                "own network": own,
                "checkpointing": max(abs(a - b) / abs(b) for a, b in pairs),
                "r1": logs["r1"],
            }
    return result


def backend_scales(family: str) -> list:
    with training_backend(load(family)) as backend:
        return list(backend.multi_scale_taps())


def fed_blocks() -> dict:
    """What enters a block when an inlet feeds it: image tokens move, text and fill do not, and each row takes its own
    latents, also among texts of different lengths."""
    result = {}
    for family in FAMILIES:
        with training_backend(load(family)) as backend, torch.no_grad():
            batch = example(backend, family, 3)
            if family not in ("wan", "flux2"):
                long = tiny_models.conditioning(family, 2)
                long[0][0] = torch.cat([long[0][0], long[0][0].flip(1)], dim=1)
                short = tiny_models.conditioning(family)
                batch = Batch(batch.latents, backend.cond(short + long + short))
            heads = diffusion2gan(backend, batch, "lora").discriminator
            name = backend.multi_scale_taps()[1][-1] if backend.multi_scale_taps()[1] else None
            if name is None:
                continue
            seen, block = [], backend.network.get_submodule(name)

            def note(module, args, kwargs, seen=seen):
                seen.append([v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.ndim in (3, 4)])

            handle = block.register_forward_pre_hook(note, with_kwargs=True)  # after the inlet's own
            noise = torch.zeros_like(batch.latents)
            plain = heads(batch.latents, noise, batch.cond)
            forwards = len(seen)
            torch.nn.init.normal_(heads.input_convs[-1].weight)
            fed = heads(batch.latents, noise, batch.cond)
            handle.remove()
            before, after = seen[:forwards], seen[forwards:]
            pairs = [pair for both in zip(before, after, strict=True) for pair in zip(*both, strict=True)]
            changed = [(b - a).abs().amax((0, 1) if a.ndim == 4 else (0, 2)) > 0 for a, b in pairs]
            positions = [int(where.sum()) for where in changed]
            rows = [slice(i, i + 1) for i in range(3)]
            alone = torch.cat([heads(batch.latents[r], noise[r], batch.cond[r]) for r in rows])
            grid = backend.architecture.token_grid(backend.network, *batch.latents.shape[-2:])
            result[family] = {
                "positions": [p for p in positions if p],
                "image": grid[0] * grid[1],
                "effect": relative(fed, plain),
                "rows alone": relative(fed, alone),
            }
    return result


if __name__ == "__main__":
    write("copies", [same_network, gradients, precisions, exported_differences, full_step, critics, fed_blocks])
