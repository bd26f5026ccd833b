"""Runs inside the host's Python: the scenes models that are shown a picture.  probe_scenes.py FOLDER

FOLDER/kind says which. FOLDER/in.safetensors has x, sigma, context, pooled, and as the host has them pictures
[B, H, W, 3] and masks [B, H, W].
out.safetensors receives what core's own nodes and samplers make of them (``told``), what they make without a picture
(``untold``), and what training has (``trained``).
"""

from as_host import folder

# isort: split
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from host_denoised import host_denoised
from pack.distill_core.models.denoiser import Denoiser
from pack.nodes.host.backend import training_backend
from pack.nodes.host.items import items_of
from pack.nodes.host.scenes import load_scenes_model
from safetensors.torch import load_file, save_file

import nodes

KIND = (folder / "kind").read_text()


def as_nodes_tell(row: int, vae, plain: list) -> list:
    """The CONDITIONING of a row by the node for its kind."""
    pictures = given["pictures"][[row]]
    if KIND == "inpainting":
        return nodes.InpaintModelConditioning().encode(plain, plain, pictures, vae, given["masks"][[row]])[0]
    return InstructPixToPixConditioning.execute(plain, plain, pictures, vae)[0]


given = load_file(folder / "in.safetensors")
x, sigma, rows = given["x"], given["sigma"], range(len(given["x"]))
plain = [[[given["context"][[row]], {"pooled_output": given["pooled"][[row]]}]] for row in rows]
with torch.inference_mode():
    model, vae, _ = load_scenes_model(KIND)
    told = [as_nodes_tell(row, vae, plain[row]) for row in rows]
    result = {
        name: torch.cat([host_denoised(model, conds[row], x[[row]], sigma[[row]]) for row in rows])
        for name, conds in (("told", told), ("untold", plain))
    }
with training_backend(model) as backend, torch.no_grad():
    result["trained"] = Denoiser(backend)(x, sigma, backend.cond([entry for (entry,) in told]))
save_file({name: value.float().contiguous().clone() for name, value in result.items()}, folder / "out.safetensors")
print("takes:", *items_of(model.model))
