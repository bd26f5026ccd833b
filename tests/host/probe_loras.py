"""Runs inside the host's Python: which turbo LoRAs `turbo_loras` finds on models, and what Turbo Preset makes of them.

probe_loras.py FOLDER
"""

from as_host import folder

# isort: split
import json

import comfy.sd
import comfy.utils
import folder_paths
import tiny_models
import torch
from pack.distill_core.presets.doctor import diagnose
from pack.nodes import sampling
from pack.nodes.host.loras import turbo_loras
from pack.nodes.host.model import facts_of
from safetensors.torch import save_file

LORAS = folder / "loras"
LORAS.mkdir()
folder_paths.add_model_folder_path("loras", str(LORAS), is_default=True)
MODELS = {name: comfy.sd.load_diffusion_model(tiny_models.write(name, folder)) for name in ("sd3", "flux", "sd15")}


def write(
    name: str, metadata: dict | None, seed: int, layer: str = "transformer.transformer_blocks.0.attn.to_q"
) -> str:
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{layer}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(128, 2, generator=generator),
    }
    save_file(state, LORAS / name, metadata)
    return name


def described(sigmas: list[float], sampler: str = "renoise", family: str = "sd3") -> dict[str, str]:
    entries = {"sigmas": json.dumps(sigmas), "sampler": sampler, "cfg": "1.0", "family": family, "method": "LADD"}
    return {f"turbo_distill.{key}": value for key, value in entries.items()}


TURBO = write("turbo.safetensors", described([1.0, 0.6, 0.3]), 1)
OTHER = write("other turbo.safetensors", described([1.0, 0.5], "ancestral"), 2)
TWIN = write("twin.safetensors", described([1.0, 0.6, 0.3]), 3)
PLAIN = write("plain.safetensors", None, 4)
KOHYA = write(
    "kohya.safetensors", {"ss_network_dim": "2", "format": "pt"}, 5, "transformer.transformer_blocks.1.attn.to_q"
)
DIFFERENCES = "differences.safetensors"
save_file(
    {"diffusion_model.joint_blocks.0.x_block.attn.qkv.diff": torch.randn(384, 128)},
    LORAS / DIFFERENCES,
    described([1.0, 0.8]),
)


def load(model, name: str, strength: float = 1.0):
    lora, metadata = comfy.utils.load_torch_file(str(LORAS / name), return_metadata=True)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0, lora_metadata=metadata)[0]


def stack(family: str, *loras) -> object:
    model = MODELS[family]
    for lora in loras:
        model = load(model, *(lora if isinstance(lora, tuple) else (lora,)))
    return model


def seen(model, steps: int = 0) -> dict:
    found = [[lora.name, lora.layers, lora.strength] for lora in turbo_loras(model)]
    try:
        sigmas, _, _, text = sampling.TurboPreset.execute(model, "auto", steps, 1.0, "snap").result
    except ValueError as error:
        return {"loras": found, "error": str(error)}
    return {"loras": found, "sigmas": sigmas.tolist(), "text": text}


def removed() -> dict:
    """The file is gone since it was loaded: its metadata still counts while it is the last."""
    gone = write("gone.safetensors", described([1.0, 0.7]), 8)
    model = stack("sd3", gone)
    (LORAS / gone).unlink()
    return seen(model)


STACKS = {
    "turbo": ("sd3", TURBO),
    "turbo, kohya": ("sd3", TURBO, KOHYA),
    "kohya, turbo": ("sd3", KOHYA, TURBO),
    "turbo, plain": ("sd3", TURBO, PLAIN),
    "turbo, kohya, plain, kohya": ("sd3", TURBO, (KOHYA, 0.3), PLAIN, KOHYA),
    "turbo at .8, kohya": ("sd3", (TURBO, 0.8), KOHYA),
    "two turbos": ("sd3", TURBO, OTHER),
    "two turbos of the same levels": ("sd3", TURBO, TWIN),
    "differences, kohya": ("sd3", DIFFERENCES, KOHYA),
    "kohya": ("sd3", KOHYA),
    "nothing": ("sd3",),
    "turbo on flux": ("flux", TURBO),
    "turbo on sd15": ("sd15", TURBO),
}

if __name__ == "__main__":
    with torch.inference_mode():
        results = {name: seen(stack(*case)) for name, case in STACKS.items()}
        results["removed"] = removed()
        rivals = facts_of(stack("sd3", TURBO, OTHER))
        results["doctor"] = [f.fault for f in diagnose(rivals, torch.tensor([1.0, 0.6, 0.3, 0.0]), 1.0).findings]
        results["family"] = facts_of(MODELS["sd3"]).family
    (folder / "results.json").write_text(json.dumps(results))
