"""The memory of a training step as planned, and as counted in a real one, for networks of the host."""

from host_tools import load, write

# isort: split
import tiny_models
import torch
from pack.distill_core.methods.diffusion2gan import Diffusion2GANConfig
from pack.distill_core.methods.dmd2 import DMD2Config
from pack.distill_core.methods.ladd import LADDConfig
from pack.nodes.host.plan import memory_verdict, plan_of
from planned_steps import asked, counted
from probe_quantized import scaled_fp8_file

FAMILIES = [*tiny_models.BUILDERS, *tiny_models.CONFIGS]


def planned() -> dict:
    """Family and method -> peak planned and counted."""
    found = {}
    for family in FAMILIES:
        model = load(family)
        methods = {"ladd": LADDConfig(warmup_steps=0)}
        if family in ("sd15", "flux"):
            methods["diffusion2gan"] = Diffusion2GANConfig(critic="lora", critic_rank=4)
            methods["dmd2"] = DMD2Config(fake_score_updates=2)
        for name, method in methods.items():
            request, config, shapes = asked(model, family, method)
            found[f"{family} {name}"] = [plan_of(request, config, shapes).peak, counted(request, config, shapes)]
    return found


def quantized() -> dict:
    """A scaled-fp8 file: the model's bytes as planned and as they are, and what is said where nothing is free."""
    import comfy.sd

    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(scaled_fp8_file()[0]))
    request, config, shapes = asked(model, "flux", LADDConfig(warmup_steps=0))
    plan = plan_of(request, config, shapes)
    weights = [getattr(p.data, "_qdata", p.data) for p in model.model.diffusion_model.parameters()]
    return {"planned": plan.parts["model"], "stored": sum(w.numel() * w.element_size() for w in weights)}


def said() -> dict:
    """What is said where less is free than a run needs, and where its network cannot be planned."""
    from pack.nodes.host import plan

    model = load("sd3")
    request, config, shapes = asked(model, "sd3", LADDConfig(warmup_steps=0))
    plan.free_memory = lambda device: 1000
    little = memory_verdict(request, config, shapes)
    request.model = model.clone()
    request.model.load_device = torch.device("cuda")
    try:
        plan.check_memory(request, config, shapes)
        refused = ""
    except ValueError as error:
        refused = str(error)
    request.model.load_device = torch.device("cpu")
    plan.check_memory(request, config, shapes)
    request.model = None
    return {"little": little, "refused": refused, "unknown": memory_verdict(request, config, shapes)}


write("plan", [planned, quantized, said])
