"""Runs inside the host's Python: a tiny inpainting checkpoint of SD 1.5's type.  tiny_inpainting.py FOLDER

FOLDER/inpainting.safetensors has a network of nine input channels and a tiny autoencoder; no text encoder.
"""

from as_host import folder

# isort: split
import comfy.taesd.taesd
import tiny_models
from safetensors.torch import save_file

parts = {
    "model.diffusion_model.": tiny_models.WITH_ITEMS["sd15 inpainting"](),
    "first_stage_model.": comfy.taesd.taesd.TAESD(latent_channels=4),
}
state = {
    f"{prefix}{name}": value for prefix, part in parts.items() for name, value in tiny_models.random_state(part).items()
}
for name in ("vae_scale", "vae_shift"):
    state[f"first_stage_model.{name}"] = parts["first_stage_model."].state_dict()[name]
save_file(state, folder / "inpainting.safetensors")
