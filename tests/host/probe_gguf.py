"""GGUF files opened by the pack's own loader (gguf_pack.py): gradients of a LoRA, a tiny run, what is refused."""

from host_tools import folder, write

# isort: split
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import quantized_files
import torch
from gguf_pack import gguf_model
from measured import measured_peak
from pack.distill_core.methods.components import Components
from pack.distill_core.methods.ladd import LADDConfig
from pack.distill_core.training.loop import training_step
from pack.distill_core.training.run import assemble
from pack.nodes.host.backend import training_backend
from pack.nodes.host.plan import plan_of
from planned_steps import asked
from probe_quantized import compared, one_layer, plain_model, runs
from safetensors.torch import load_file


def gguf() -> dict:
    found, models = {}, {}
    for kind in quantized_files.GGUF_FORMATS:
        path, plain = quantized_files.gguf_files(kind, folder)
        models[kind], right = gguf_model(path), load_file(plain)["double_blocks.0.img_attn.qkv.weight"]
        found[kind] = compared(models[kind], plain_model(plain)) | one_layer(models[kind], right)
    return {"found": found, "runs": runs(models)}


def memory() -> dict:
    """The training copy of a GGUF model lies in the same memory as MODEL's, which is mapped from the file."""
    model = gguf_model(folder / "Q8_0.gguf")
    name = "double_blocks.0.img_attn.qkv"
    with training_backend(model) as backend:
        own, given = backend.network.get_submodule(name).weight, model.model.diffusion_model.get_submodule(name).weight
        return {"same": own.data_ptr() == given.data_ptr(), "inference": [own.is_inference(), given.is_inference()]}


def all_weights() -> str:
    with training_backend(gguf_model(folder / "Q8_0.gguf")) as backend:
        try:
            backend.trainable_copy()
        except ValueError as error:
            return str(error)
    return "accepted"


torch.set_num_threads(1)


def planned() -> dict:
    """Format -> the peak of a step beside the model's weights, as planned and as torch's profiler sees it.

    The weights are mapped from the file, which the profiler does not count.
    """
    found = {}
    for kind in ("Q8_0", "Q4_K"):
        request, config, shapes = asked(gguf_model(folder / f"{kind}.gguf"), "flux", LADDConfig(warmup_steps=0))
        plan = plan_of(request, config, shapes)
        with training_backend(request.model) as backend:

            def build(backend=backend, config=config, shapes=shapes):
                run = assemble(config, Components(backend), shapes)
                training_step(run)
                run.step = 1
                return lambda: training_step(run)

            found[kind] = [plan.peak - plan.parts["model"], measured_peak(build)]
    return found


write("gguf", [gguf, memory, all_weights, planned])
