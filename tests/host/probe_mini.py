"""Runs inside the host's Python: loads model files with ComfyUI's own loaders and writes what they compute.

    probe_mini.py TRANSFORMER AUTOENCODER LORA INPUTS OUTPUTS

INPUTS is a safetensors file with x, sigma, context, pooled and image; OUTPUTS receives
denoised, with_lora, decoded and encoded.
"""

import os
import sys
from pathlib import Path

from launch import ImportHooks

sys.meta_path.insert(0, ImportHooks())
sys.path[0] = str(Path(os.environ["COMFYUI_PATH"]))
transformer, autoencoder, lora, inputs, outputs = sys.argv[1:]
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def denoise(model, data: dict) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model.model.apply_model(data["x"], data["sigma"], c_crossattn=data["context"], y=data["pooled"])


with torch.inference_mode():
    data = load_file(inputs)
    model = comfy.sd.load_diffusion_model(transformer)
    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(lora), 1.0, 0.0)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(autoencoder))
    latent_format = model.model.latent_format
    result = {"denoised": denoise(model, data), "with_lora": denoise(patched, data)}
    result["decoded"] = vae.decode(latent_format.process_out(data["x"]))
    result["encoded"] = latent_format.process_in(vae.encode(data["image"]))
    save_file({name: value.float().contiguous().clone() for name, value in result.items()}, outputs)
print("family:", type(model.model).__name__)
