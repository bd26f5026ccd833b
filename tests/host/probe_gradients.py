"""Runs inside the host's Python: are gradients through the host's networks right?  probe_gradients.py FOLDER

Each function measures one thing and returns what JSON can hold; test_comfy_denoiser.py says what it must be.
"""

from host_tools import DIRECT, excite, latents, load, relative, write

# isort: split
import comfy.model_management
import comfy_extras.nodes_train as core_train
import tiny_models
import torch
import torch._dynamo
from pack.distill_core.models.denoiser import Denoiser
from pack.distill_core.models.lora import Lora, LoraSwitch
from pack.nodes.host.architectures import architecture_of
from pack.nodes.host.backend import training_backend
from torch._dynamo.testing import CompileCounterWithBackend


class Sums:
    """Fixed random weights for outputs, so that a scalar depends on all of them and no output outweighs the others."""

    def __init__(self) -> None:
        self.generator, self.weights = torch.Generator().manual_seed(9), {}

    def __call__(self, outputs) -> torch.Tensor:
        total = 0.0
        for i, out in enumerate(outputs):
            if i not in self.weights:
                weights = torch.randn(out.shape, generator=self.generator, dtype=torch.float64)
                self.weights[i] = weights / out.detach().double().square().mean().sqrt()
            total = total + (out.double() * self.weights[i]).sum()
        return total


def derivative_error(loss, parameters: list[torch.Tensor], step: float = 2e-2) -> float:
    """Backward's derivative along two random directions against five-point differences: the larger relative error."""
    return max(_derivative_error(loss, parameters, step, seed) for seed in (2, 3))


def _derivative_error(loss, parameters: list[torch.Tensor], step: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(p.shape, generator=generator).to(p) * p.std().clamp(0.01) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    ours = sum((g.double() * d.double()).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = {}
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for k in (-2, -1, 1, 2):
            for p, s, d in zip(parameters, start, direction, strict=True):
                p.copy_(s + k * step * d)
            values[k] = loss().double()
        for p, s in zip(parameters, start, strict=True):
            p.copy_(s)
    true = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
    return ((ours - true).abs() / true.abs()).item()


def in_double(network) -> None:
    """The whole network in float64; Wan's patch embedding insists on float32 input."""
    network.double()
    network.dtype = torch.float64
    if hasattr(network, "patch_embedding"):
        embed = network.patch_embedding
        embed.forward = lambda x: type(embed).forward(embed, x.double())


def gradients() -> dict:
    """Family -> `errors_of_student`."""
    result = {}
    for family in [*tiny_models.BUILDERS, *DIRECT]:
        positive = tiny_models.conditioning(family) + tiny_models.conditioning(family, 2)
        result |= errors_of_student(family, load(family), lambda backend, positive=positive: backend.cond(positive))
    return result


def errors_of_student(family: str, model, cond_of) -> dict[str, float]:
    """Error of the path's gradient through student, re-noising and teacher features, LADD's student loss, with and
    without checkpointing.  cond_of: a backend's conditionings of two rows."""
    result = {}
    for checkpointing in (False, True):
        with training_backend(model, checkpointing) as backend:
            in_double(backend.network)
            path = backend.new_lora(2).double()
            excite(path)
            student, teacher = Denoiser(backend, path), Denoiser(backend)
            cond = cond_of(backend).to(dtype=torch.float64)
            x, noise = latents(family).double(), latents(family, seed=1).double()
            sigma, sums = backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.6]).double()), Sums()

            def loss(student=student, teacher=teacher, x=x, noise=noise, cond=cond, sigma=sigma, sums=sums):
                fake = student(x, sigma, cond)
                renoised = teacher.process.noise_scaling(sigma * 0.7, noise, fake)
                return sums([fake, *teacher.features(renoised, sigma * 0.7, cond, teacher.backend.tap_names)])

            name = f"{family} {'checkpointed' if checkpointing else 'plain'}"
            result[name] = derivative_error(loss, list(path.parameters()))
    return result


def gradients_of_core() -> dict:
    """The same measure on core's way: its own checkpointing at the default depth, and without it."""
    result = {}
    for family in ("sd3", "flux", "flux2"):
        for checkpointing in (True, False):
            with torch.inference_mode(False):
                patcher = load(family).clone(force_deepcopy=True)
                inner = patcher.model.requires_grad_(False).train()
                network = inner.diffusion_model
                in_double(network)
                switch = LoraSwitch()
                targets = architecture_of(network).lora_targets(network)
                path = Lora(network, targets, 2, switch).double()
                excite(path)
                switch.active = path
                if checkpointing:
                    for module in core_train.find_modules_at_depth(network, depth=1):
                        core_train.patch(module)
                positive = tiny_models.conditioning(family)[0]
                extra = {"guidance": torch.tensor([3.5])} if family.startswith("flux") else {}
                x, sums = latents(family, 1), Sums()

                def loss(inner=inner, x=x, sums=sums, positive=positive, extra=extra):
                    pooled = positive[1]["pooled_output"]
                    return sums([inner.apply_model(x, torch.tensor([0.8]), c_crossattn=positive[0], y=pooled, **extra)])

                name = f"{family} {'default depth' if checkpointing else 'no checkpointing'}"
                comfy.model_management.in_training = True
                try:
                    result[name] = derivative_error(loss, list(path.parameters()))
                except RuntimeError as error:
                    result[name] = str(error)[:200]
                finally:
                    comfy.model_management.in_training = False
    return result


def compiled() -> dict:
    """LADD's student loss with the blocks compiled (traced by dynamo and AOTAutograd) against that without.

    Family -> relative errors of output and gradient, and how many graphs were compiled for how many blocks.
    """
    result = {}
    for family in ("flux", "sd15"):
        with training_backend(load(family)) as backend:
            path = backend.new_lora(2)
            excite(path)
            student, teacher, x = Denoiser(backend, path), Denoiser(backend), latents(family)
            cond = backend.cond(tiny_models.conditioning(family) + tiny_models.conditioning(family, 2))
            sigma, taps = torch.full((2,), 0.5), backend.default_taps(2)

            def step(student=student, teacher=teacher, x=x, cond=cond, sigma=sigma, taps=taps, path=path):
                fake = student(x, sigma, cond)
                maps = teacher.features(fake, sigma, cond, taps)
                loss = sum(m.float().square().mean() for m in maps) + fake.square().mean()
                return fake.detach(), torch.autograd.grad(loss, list(path.parameters()), allow_unused=True)

            plain, counter = step(), CompileCounterWithBackend("aot_eager")
            backend.compile(counter)
            fast = step()
            errors = [relative(a, b) for a, b in zip(fast[1], plain[1], strict=True) if b is not None and b.any()]
            result[family] = [relative(fast[0], plain[0]), max(errors), counter.frame_count, len(backend.wrapped)]
        torch._dynamo.reset()
    return result


def separate_taps() -> dict:
    """In-place blocks make all taps one buffer; with the guard each keeps its own."""
    result = {}
    for family in ("flux", "flux2"):
        with training_backend(load(family), checkpointing=False) as backend, torch.no_grad():
            teacher, cond, x = Denoiser(backend), backend.cond(tiny_models.conditioning(family)), latents(family, 1)
            sigma = torch.tensor([0.5])
            maps = teacher.features(x, sigma, cond, ["single_blocks.0", "single_blocks.1"])
            backend.release()
            bare = teacher.features(x, sigma, cond, ["single_blocks.0", "single_blocks.1"])
        result[family] = {"guarded": torch.equal(*maps), "bare": torch.equal(*bare)}
    return result


if __name__ == "__main__":
    write("gradients", [gradients, gradients_of_core, compiled, separate_taps])
