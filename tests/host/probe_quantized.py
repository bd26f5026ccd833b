"""Networks whose weights are quantized, as files of the host and of its best-known GGUF loader have them."""

from host_tools import a_run, excite, folder, latents, load, write

# isort: split
import json

import comfy.model_patcher
import comfy.ops
import comfy.sd
import quantized_files
import tiny_models
import torch
from pack.distill_core.models.denoiser import Denoiser
from pack.distill_core.training.loop import training_step
from pack.nodes.host.backend import training_backend
from pack.nodes.host.copies import own_copy
from pack.nodes.host.identity import identity, weights_identity
from quantized_files import BLOCKS
from safetensors.torch import load_file, save_file


def scaled_fp8_file(family: str = "flux"):
    """The tiny file with the linear layers of its blocks in fp8 with a scale, and the same weights in float32."""
    state, scaled, plain = load_file(tiny_models.write(family, folder)), {}, {}
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and value.ndim == 2 and layer.startswith(BLOCKS):
            scale = value.abs().max() / 448
            small = (value / scale).to(torch.float8_e4m3fn)
            config = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
            scaled |= {name: small, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": config}
            plain[name] = small.float() * scale
        else:
            scaled[name] = plain[name] = value
    paths = []
    for kind, content in (("scaled", scaled), ("plain", plain)):
        paths.append(folder / f"{family}-{kind}.safetensors")
        save_file(content, paths[-1])
    return paths


def gradients(model, family: str):
    """Denoised latents, the gradients of a LoRA and of the latents, and how many layers it trains."""
    with training_backend(model) as backend:
        lora = backend.new_lora(2)
        excite(lora)
        cond = backend.cond(tiny_models.conditioning(family, 1) * 2)
        x, sigma = latents(family).requires_grad_(), torch.tensor([0.8, 0.3])
        out = Denoiser(backend, lora)(x, sigma, cond)
        grads = torch.autograd.grad(out.square().mean(), [x, *lora.parameters()])
        return out.detach(), grads[0], torch.cat([g.flatten() for g in grads[1:]]), len(lora.targets)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def plain_model(path):
    """A MODEL in the format of the file."""
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


def compared(quantized, plain) -> dict:
    """A LoRA on a quantized MODEL against one on the same weights in float32: relative errors, and its layers."""
    (*found, count), (*right, plain_count) = (gradients(model, "flux") for model in (quantized, plain))
    names = zip(("out", "x", "lora"), (error(a, b) for a, b in zip(found, right, strict=True)), strict=True)
    return {**dict(names), "layers": [count, plain_count]}


def one_layer(model, weight: torch.Tensor) -> dict:
    """A quantized layer in training: whether it gives the same with a gradient as without, and how far its gradient is
    from that of its weight in full; the gradient of that gradient too."""
    with training_backend(model) as backend:
        layer = backend.network.get_submodule("double_blocks.0.img_attn.qkv")
        x = torch.randn(2, 6, weight.shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
        towards = torch.randn(2, 6, weight.shape[0], generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = layer(x)
        grad = torch.autograd.grad(out, x, towards, create_graph=True)[0]
        twice = torch.autograd.grad(grad.square().sum() / 2, towards)[0]
        with torch.no_grad():
            same = torch.equal(layer(x), out)
    right = towards @ weight
    return {"same": same, "grad": error(grad, right), "twice": error(twice, right @ weight.T)}


def losses(model, seed: int) -> list[float]:
    """The discriminator's loss in the first steps of a LADD run."""
    torch.manual_seed(seed)
    with training_backend(model) as backend:
        run = a_run(backend, tiny_models.conditioning("flux", 1), latents("flux", 4), seed=seed, student_lr=1e-3)
        return [training_step(run)["discriminator"] for _ in range(3)]


def runs(quantized: dict) -> dict:
    """Losses of runs on quantized MODELs, on their weights in bfloat16, and on those with other seeds."""
    state, _ = quantized_files.flux()
    base = plain_model(quantized_files.saved(folder / "base.safetensors", state, torch.bfloat16))
    found = {kind: losses(model, 0) for kind, model in quantized.items()}
    return {"bfloat16": [losses(base, seed) for seed in range(4)], **found}


def host_formats() -> dict:
    """Every format of the host: as on this CPU, and where another kernel can be had here, as on a card that has it."""
    found, models = {}, {}
    for kind in quantized_files.HOST_FORMATS:
        path, plain = quantized_files.host_files(kind, folder)
        models[kind], right = plain_model(path), load_file(plain)["double_blocks.0.img_attn.qkv.weight"]
        found[kind] = compared(models[kind], plain_model(plain)) | one_layer(models[kind], right)
        if kind in ("float8_e4m3fn", "nvfp4"):
            card = plain_model(path)
            card.cached_patcher_init = None  # it is copied, not loaded again
            for module in card.model.modules():
                if hasattr(module, "_full_precision_mm"):
                    module._full_precision_mm = False
            found[f"{kind} on a card"] = compared(card, plain_model(plain)) | one_layer(card, right)
    return {"found": found, "runs": runs(models)}


def scaled_fp8() -> dict:
    """A LoRA on a scaled-fp8 file against one on the same weights in float32."""
    scaled, plain = map(plain_model, scaled_fp8_file())
    kinds = {type(m).__qualname__ for m in scaled.model.modules() if hasattr(m, "in_features")}
    return compared(scaled, plain) | {"kinds": sorted(kinds)}


class Q8Tensor(torch.Tensor):
    """A weight as ComfyUI-GGUF's loader gives it: raw blocks (a float16 scale and 32 int8) that say another shape."""

    tensor_shape: torch.Size

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())

    def new_empty(self, size, *args, **kwargs):
        return super().new_empty(size, *args, **kwargs).as_subclass(Q8Tensor)

    def detach(self):
        return self

    def clone(self):
        return self


def q8_of(weight: torch.Tensor) -> Q8Tensor:
    blocks = weight.float().view(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float()).round().to(torch.int8)
    raw = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1).as_subclass(Q8Tensor)
    raw.tensor_shape = weight.shape
    return raw


class GGUFLinear(comfy.ops.manual_cast.Linear):
    """That loader's layer: dequantizes in its forward, and shows empty stand-ins in its state."""

    def dequantized(self) -> torch.Tensor:
        raw, shape = self.weight.data.as_subclass(torch.Tensor), (self.out_features, self.in_features)
        return (raw[:, :2].contiguous().view(torch.float16).float() * raw[:, 2:].view(torch.int8)).view(shape)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.dequantized().to(x.dtype), self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = torch.empty(self.out_features, self.in_features, device="meta")
        if self.bias is not None:
            destination[prefix + "bias"] = torch.empty(self.bias.shape, device="meta")


def gguf() -> dict:
    """A LoRA on a network with such layers against one on the same weights in float32."""
    quantized, plain = load("flux"), load("flux")
    count = 0
    for name, layer in list(quantized.model.diffusion_model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name.startswith(BLOCKS):
            with torch.inference_mode(False):
                layer.weight = torch.nn.Parameter(q8_of(layer.weight.clone()), requires_grad=False)
                layer.__class__ = GGUFLinear
            with torch.inference_mode():
                plain.model.diffusion_model.get_submodule(name).weight.copy_(layer.dequantized())
            count += 1
    for model in (quantized, plain):
        model.cached_patcher_init = None
    return compared(quantized, plain) | {"quantized": count, "identity": identity(quantized) != identity(plain)}


def fast_fp8() -> dict:
    """A copy of a model whose layers would multiply in fp8 where no gradient is asked."""
    model = load("flux")
    copied = {}
    for module in model.model.modules():
        if isinstance(module, comfy.ops.manual_cast.Linear | comfy.ops.disable_weight_init.Linear):
            module.__class__ = comfy.ops.fp8_ops.Linear
    model.cached_patcher_init = None
    with torch.inference_mode(False):
        copy = own_copy(model)
    for module in copy.model.modules():
        copied[type(module).__qualname__] = copied.get(type(module).__qualname__, 0) + 1
    fast = sum(type(m) is comfy.ops.fp8_ops.Linear for m in model.model.modules())
    return {
        "fast in MODEL": fast,
        "fast in copy": sum(type(m) is comfy.ops.fp8_ops.Linear for m in copy.model.modules()),
        "ordinary in copy": sum(type(m) is comfy.ops.manual_cast.Linear for m in copy.model.modules()),
    }


def stand_ins() -> dict:
    """The identity of a MODEL whose layers show empty stand-ins in their state, as ComfyUI-GGUF's do."""
    model = load("flux")
    before = identity(model), weights_identity(model)

    class Shy(comfy.ops.disable_weight_init.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "weight"] = self.weight.to("meta")
            if self.bias is not None:
                destination[prefix + "bias"] = self.bias.to("meta")

    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Shy
    return {
        "same": before == (identity(model), weights_identity(model)),
        "meta": any(value.is_meta for value in model.model.state_dict().values()),
    }


if __name__ == "__main__":
    write("quantized", [scaled_fp8, host_formats, gguf, fast_fp8, stand_ins])
