"""Runs inside the host's Python: networks whose blocks wait in host memory or in a file.  probe_offload.py FOLDER"""

from host_tools import a_lora, folder, host_denoised, latents, load, write

# isort: split
import comfy.sd
import tiny_models
import torch
from pack.distill_core.methods.components import Components, DiscriminatorConfig
from pack.distill_core.methods.diffusion2gan import Diffusion2GANConfig
from pack.distill_core.methods.ladd import LADDConfig
from pack.distill_core.training.loop import training_step
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.plan import Shapes
from pack.distill_core.training.run import RunConfig, StudentConfig, assemble
from pack.nodes.host.backend import training_backend

LADD, OF_ITS_OWN = LADDConfig(warmup_steps=0), Diffusion2GANConfig({"adversarial": 1.0}, critic="copy")
METHODS = {"sd15": LADD, "sdxl": OF_ITS_OWN, "flux": LADD, "wan": LADD}


def student(family: str, offload: str, copies: bool = False) -> tuple[list[torch.Tensor], bool]:
    """A trained student after two steps, and whether every weight is back where it waits."""
    torch.manual_seed(0)  # of the batches, which `Shapes` draws
    train = TrainConfig(batch_size=2, offload=offload)
    with training_backend(load(family), True, train, folder) as backend:
        if copies:
            backend.offload("cpu", "ram", copies=True)
        cond, heads = backend.cond(tiny_models.conditioning(family, 1)), DiscriminatorConfig(width=8, blocks=1)
        config = RunConfig(METHODS[family], train, StudentConfig(4), {"base": "", "dataset": ""}, heads)
        run = assemble(config, Components(backend), Shapes(tuple(latents(family).shape[1:]), cond, (), 1.0))
        for step in range(2):
            run.step = step
            training_step(run)
        homes = [home for block in backend.offloaded.homes for home in block] if backend.offloaded else []
        back = all(module._parameters[name] is weight for module, name, weight in homes)
        return [value.detach().clone() for value in run.student_parameters.values()], back and bool(homes)


def same_student() -> dict:
    """Family and place -> whether it is the student of a run without offload, and whether all is back."""
    found = {}
    places = {"ram": ("ram", False), "file": ("file", False), "ram to a device": ("none", True)}
    for family in METHODS:
        plain, _ = student(family, "none")
        for place, (offload, copies) in places.items():
            away, back = student(family, offload, copies)
            same = all(torch.equal(a, b) for a, b in zip(plain, away, strict=True))
            found[f"{family} {place}"] = [same, back]
    return found


def one_memory() -> dict:
    """MODEL with a LoRA, and then without, beside a training copy in the file tier: how many of the copy's weights lie
    where MODEL's did before, and where they do now, and whether MODEL's output stays."""
    plain = load("sd15")
    with torch.inference_mode():
        lora = {name: value.clone() for name, value in a_lora("sd15", plain).items()}
        patched = comfy.sd.load_lora_for_models(plain, None, lora, 0.7, 0.0)[0]
    asked, found = (tiny_models.conditioning("sd15", 1), latents("sd15"), torch.tensor([8.0, 0.3])), {}
    for name, model in {"patched": patched, "plain": plain}.items():
        before = host_denoised(model, *asked)
        old = {value.data_ptr() for value in model.model.diffusion_model.parameters()}
        with training_backend(model, True, TrainConfig(batch_size=2, offload="file"), folder) as backend:
            own = {value.data_ptr() for value in backend.offloaded.weights()}
            given = {value.data_ptr() for value in model.model.diffusion_model.parameters()}
            weights = len(own)
        same = torch.equal(before, host_denoised(model, *asked))
        found[name] = {"weights": weights, "in the old place": len(own & old), "shared": len(own & given), "same": same}
    return found


write("offload", [same_student, one_memory])
