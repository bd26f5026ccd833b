"""The memory of a training step as planned, and as counted in a real one, for networks of the host."""

from host_tools import latents, load, write

# isort: split
from types import SimpleNamespace

import tiny_models
import torch
from pack.distill_core.methods.components import Components, DiscriminatorConfig
from pack.distill_core.methods.diffusion2gan import Diffusion2GANConfig
from pack.distill_core.methods.ladd import LADDConfig
from pack.distill_core.training.ledger import Ledger
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.plan import Shapes, counted_step
from pack.distill_core.training.run import RunConfig, StudentConfig, assemble
from pack.nodes.host.backend import training_backend
from pack.nodes.host.parts import Parts
from pack.nodes.host.plan import memory_verdict, plan_of
from probe_quantized import scaled_fp8_file

FAMILIES = [*tiny_models.BUILDERS, *tiny_models.CONFIGS]


def asked(model, family: str, method, **student):
    """A request as `plan_of` reads it, with what decides the run and the shapes of its dataset."""
    with training_backend(model) as backend:
        cond = backend.cond(tiny_models.conditioning(family, 1))
        levels = method.levels(backend.process) if method.weight("pairs") else ()
    heads, train = DiscriminatorConfig(width=8, blocks=1), TrainConfig(batch_size=4)
    config = RunConfig(method, train, StudentConfig(4), {"base": "", "dataset": ""}, heads)
    request = SimpleNamespace(model=model, train=train, student=config.student, parts=Parts(), checkpointing=True)
    return request, config, Shapes(tuple(latents(family).shape[1:]), cond, levels, 2.0)


def counted(request, config, shapes) -> int:
    """The same step with real tensors."""
    with training_backend(request.model) as backend:
        ledger = Ledger()
        with ledger:
            run = assemble(config, Components(backend), shapes)
            counted_step(ledger, run)
        return ledger.peak


def planned() -> dict:
    """Family and method -> peak planned and counted."""
    found = {}
    for family in FAMILIES:
        model = load(family)
        methods = {"ladd": LADDConfig(warmup_steps=0)}
        if family in ("sd15", "flux"):
            methods["diffusion2gan"] = Diffusion2GANConfig(critic="lora", critic_rank=4)
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
