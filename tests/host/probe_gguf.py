"""GGUF files opened by the pack's own loader (gguf_pack.py): gradients of a LoRA, a tiny run, what is refused."""

from host_tools import folder, write

# isort: split
import quantized_files
import torch
from gguf_pack import gguf_model
from pack.nodes.host.backend import training_backend
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
write("gguf", [gguf, memory, all_weights])
