"""Runs inside the host's Python: what the host computes with a shipped model.

probe_shipped.py FOLDER

FOLDER/name says which: "mini", by ComfyUI's own loaders, or "scenes", by the loader of its node. Beside it are
student.safetensors and in.safetensors (x, sigma, context, pooled and image); out.safetensors receives denoised,
with_lora, decoded and encoded.
"""

from as_host import folder

# isort: split
import logging
import sys

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from pack.distill_core.models.mini import ASSETS
from pack.nodes.host.scenes import load_scenes_model
from safetensors.torch import load_file, save_file

logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))  # keys of the LoRA that are left over


def load_mini() -> tuple:
    model = comfy.sd.load_diffusion_model(str(ASSETS / "transformer.safetensors"))
    return model, comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(ASSETS / "autoencoder.safetensors")))


def denoise(model, data: dict) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model.model.apply_model(data["x"], data["sigma"], c_crossattn=data["context"], y=data["pooled"])


with torch.inference_mode():
    data = load_file(folder / "in.safetensors")
    model, vae, *_ = load_mini() if (folder / "name").read_text() == "mini" else load_scenes_model()
    lora = comfy.utils.load_torch_file(str(folder / "student.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    latent_format = model.model.latent_format
    result = {"denoised": denoise(model, data), "with_lora": denoise(patched, data)}
    result["decoded"] = vae.decode(latent_format.process_out(data["x"]))
    result["encoded"] = latent_format.process_in(vae.encode(data["image"]))
    save_file({k: v.float().contiguous().clone() for k, v in result.items()}, folder / "out.safetensors")
print("family:", type(model.model).__name__)
