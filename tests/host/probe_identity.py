"""What a MODEL carries: refused, honoured, told in the student's file, and merged into one file."""

from host_tools import a_lora, excite, folder, host_denoised, latents, load, relative, write

# isort: split
from dataclasses import asdict

import comfy.hooks
import comfy.sd
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from pack.distill_core.files import load_tensors
from pack.distill_core.lora_files import save_lora
from pack.distill_core.models.denoiser import Denoiser
from pack.distill_core.presets.recipe import make_recipe
from pack.nodes.host.backend import training_backend
from pack.nodes.host.identity import identity, loras_below, weights_identity
from pack.nodes.host.merge import merged_patches
from pack.nodes.host.model import facts_of, training_process_of
from safetensors.torch import save_file

LAYER = {"sd3": "joint_blocks.0.x_block.attn.proj", "sd15": "input_blocks.1.1.transformer_blocks.0.attn1.to_q"}


def plain_lora(model, family: str, kind: str = "lora", seed: int = 1) -> dict:
    """A file for one layer under its generic name: low-rank matrices, LoKr, DoRA, a difference, or a bias."""
    layer = LAYER[family]
    out, inside = model.model.diffusion_model.get_submodule(layer).weight.shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.05 * torch.randn(*shape, generator=generator)  # noqa: E731
    name = f"diffusion_model.{layer}"
    lora = {f"{name}.lora_up.weight": draw(out, 3), f"{name}.lora_down.weight": draw(3, inside)}
    return {
        "lora": lora,
        "alpha": {**lora, f"{name}.alpha": torch.tensor(1.5)},
        "dora": {**lora, f"{name}.dora_scale": 1 + draw(out, 1)},
        "lokr": {f"{name}.lokr_w1": draw(4, 4), f"{name}.lokr_w2": draw(out // 4, inside // 4)},
        "difference": {f"{name}.diff": draw(out, inside)},
        "bias": {**lora, f"{name}.diff_b": draw(out)},
    }[kind]


def with_lora(model, state: dict, strength: float = 1.0, **options):
    return comfy.sd.load_lora_for_models(model, None, state, strength, 0.0, **options)[0]


def refusal(model) -> str:
    try:
        with training_backend(model):
            return ""
    except ValueError as error:
        return str(error)


def wrapped(model, change):
    clone = model.clone()
    change(clone)
    return clone


def refused() -> dict:
    """Each thing that cannot be trained through, with what is said, and whether the identity sees it."""
    model = load("sd3")
    network = model.model.diffusion_model
    lora = plain_lora(model, "sd3")

    def compiled(m) -> None:
        modules = {"diffusion_model": network}

        def wrapper(executor, *args, **kwargs):
            return modules and executor(*args, **kwargs)

        m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", wrapper)

    def bound(m) -> None:
        block = network.joint_blocks[0]
        m.set_model_patch_replace(lambda args, extra: block and extra["original_block"](args), "dit", "double_block", 0)

    def hooked(m) -> None:
        hook = comfy.hooks.WeightHook(strength_model=1.0)
        group = comfy.hooks.HookGroup()
        group.add(hook)
        m.forced_hooks = group

    cases = {
        "bypass": comfy.sd.load_bypass_lora_for_models(model, None, lora, 0.8, 0.0)[0],
        "function": wrapped(
            model, lambda m: m.set_model_unet_function_wrapper(lambda f, a: f(a["input"], a["timestep"]))
        ),
        "hooks": wrapped(model, hooked),
        "weight": wrapped(model, lambda m: m.add_weight_wrapper("diffusion_model.x.weight", lambda w: w)),
        "object": wrapped(model, lambda m: m.add_object_patch("diffusion_model.forward", network.forward)),
        "compile": wrapped(model, compiled),
        "bound": wrapped(model, bound),
    }
    plain = identity(model)
    return {name: {"text": refusal(case), "seen": identity(case) != plain} for name, case in cases.items()}


def allowed() -> dict:
    """Patches that training honours: the backend against the host's own sampler on the same MODEL."""
    return {family: honoured(family) for family in ("sd15", "flux")}


def honoured(family: str) -> dict:
    model = load(family)
    positive, x = tiny_models.conditioning(family), latents(family, 1)
    sigma = training_process_of(model).sigma_at_flow_time(torch.tensor([0.6]))
    seen = []

    def louder(q, k, v, extra_options):
        seen.append(float(extra_options["sigmas"][0]))
        return q * 1.5, k, v

    def block(args, extra):
        seen.append(float(args["transformer_options"]["sigmas"][0]))
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.5}

    def change(m) -> None:
        if family == "sd15":
            m.set_model_attn1_patch(louder)
        else:
            m.set_model_patch_replace(block, "dit", "double_block", 0)
        m.set_model_sampler_post_cfg_function(lambda args: args["denoised"])

    patched = wrapped(model, change)
    with torch.inference_mode():
        wanted, without = host_denoised(patched, positive, x, sigma), host_denoised(model, positive, x, sigma)
    with training_backend(patched) as backend:
        found = Denoiser(backend)(x, sigma, backend.cond(positive)).detach()
    return {
        "same": relative(found, wanted),
        "moved": relative(without, wanted),
        "sigmas": [abs(value / sigma.item() - 1) for value in seen],
        "seen": identity(patched) != identity(model),
        "again": identity(wrapped(model, change)) == identity(patched),
    }


def below() -> dict:
    """What the file says of two LoRAs under the student, and what is said when it is used."""
    model = load("sd3")
    first, second = plain_lora(model, "sd3", seed=1), plain_lora(model, "sd3", "alpha", seed=2)
    teacher = with_lora(with_lora(model, first, 0.5), second, 0.8, lora_metadata={"ss_output_name": "my style"})
    with training_backend(teacher) as backend:
        path = backend.new_lora(2)
        excite(path)
        state, said = backend.export(path), backend.description()
    file = folder / "above.safetensors"
    save_lora(file, state, {"sigmas": [1.0], "cfg": 1.0, "sampler": "renoise", "method": "LADD", **said})
    student, metadata = load_tensors(file)

    def warnings(under) -> list[str]:
        return list(make_recipe(facts_of(with_lora(under, student, 1.0, lora_metadata=metadata))).warnings)

    other = load("sd3")
    with torch.no_grad():
        next(other.model.diffusion_model.parameters()).data.add_(1)
    return {
        "below": said["below"],
        "base": said["base"] == weights_identity(model) == weights_identity(teacher) != identity(teacher),
        "there": warnings(teacher),
        "missing": warnings(model),
        "weaker": warnings(with_lora(with_lora(model, first, 0.5), second, 0.3)),
        "other base": warnings(with_lora(with_lora(other, first, 0.5), second, 0.8)),
        "digests": len({lora["digest"] for lora in loras_below(teacher)}),
    }


def merged() -> dict:
    """One file on the bare MODEL against the student above its LoRAs, for each kind of patch below and each family."""
    results = {}
    cases = [(family, "lora") for family in ("flux", "wan", "sd15")]
    cases += [("sd3", kind) for kind in ("lora", "alpha", "dora", "lokr", "difference", "bias")]
    for family, kind in cases:
        model = load(family)
        under = (
            plain_lora(model, family, kind)
            if family in LAYER
            else {k: v.clone() for k, v in a_lora(family, model, 9).items()}
        )
        teacher = with_lora(with_lora(model, under, 0.7), a_lora(family, model, 4), -0.4)
        with training_backend(teacher) as backend:
            path = backend.new_lora(2)
            excite(path)
            student = with_lora(teacher, backend.export(path))
        file = folder / "merged.safetensors"
        save_file(merged_patches(student), file)
        one = with_lora(model, load_tensors(file)[0])
        positive, x = tiny_models.conditioning(family), latents(family, 1)
        sigma = training_process_of(model).sigma_at_flow_time(torch.tensor([0.7]))
        with torch.inference_mode():
            apart, together, alone = (host_denoised(m, positive, x, sigma) for m in (student, one, model))
        results[f"{family} {kind}"] = {
            "error": relative(together, apart),
            "moved": relative(alone, apart),
            "plain": all(".lora_" in name or name.endswith(".alpha") for name in load_tensors(file)[0]),
        }
    return results


def limits() -> dict:
    """What each family's network says that it takes."""
    results = {}
    for family in ("sd3", "flux", "flux2", "wan", "sd15", "sdxl", "lumina", "qwen-image"):
        with training_backend(load(family)) as backend:
            results[family] = asdict(backend.limits())
    return results


if __name__ == "__main__":
    write("identity", [refused, allowed, below, merged, limits])
