"""The shipped workflows in API format, {name: {node id: {class_type, inputs}}}; make_workflows.py makes the files.

The file names of models are those under which their publishers or ComfyUI's own examples offer them.
"""

from __future__ import annotations

from pathlib import Path

from distil_workflows import DISTIL_WORKFLOWS
from edit_workflows import EDIT_WORKFLOWS
from inpainting_workflows import INPAINTING_WORKFLOWS
from mini_workflows import MINI_WORKFLOWS, SAVED_BY_DISTIL_MINI_LADD
from sampling_workflows import SAMPLING_WORKFLOWS
from tune_workflows import TUNE_WORKFLOWS

WORKFLOWS = {
    **SAMPLING_WORKFLOWS,
    **DISTIL_WORKFLOWS,
    **INPAINTING_WORKFLOWS,
    **EDIT_WORKFLOWS,
    **TUNE_WORKFLOWS,
    **MINI_WORKFLOWS,
}
MODEL_FOLDERS = {
    "ckpt_name": "models/checkpoints",
    "unet_name": "models/diffusion_models",
    "lora_name": "models/loras",
    "vae_name": "models/vae",
    "clip_name": "models/text_encoders",
    "image": "input",
    "CLIPVisionLoader.clip_name": "models/clip_vision",
    "TurboDistillLoadPerceptual.weights": "models/perceptual",
}
TINY = ("taesd", "taesdxl", "taesd3", "taef1")  # VAEs that Load VAE makes of two files in models/vae_approx
RUNS_ANYWHERE = (
    *(name for name in DISTIL_WORKFLOWS if name.startswith("distil_mini")),
    *("own_pictures", "inpaint_scenes", "edit_scenes", "tune_mini_turbo", "prefer_mini", "make_adapter"),
    *MINI_WORKFLOWS,
)


def files() -> set[str]:
    """The model and image files that the workflows name, relative to ComfyUI's base directory."""
    found = set()
    for workflow in WORKFLOWS.values():
        for entry in workflow.values():
            for key, value in entry["inputs"].items():
                key = key.rstrip("123")
                folder = MODEL_FOLDERS.get(f"{entry['class_type']}.{key}") or MODEL_FOLDERS.get(key)
                if value in TINY:
                    found |= {f"models/vae_approx/{value}_{part}.safetensors" for part in ("encoder", "decoder")}
                elif folder and isinstance(value, str) and "." in value:
                    found.add(f"{folder}/{value}")
    return found


def add_placeholders(base_dir: Path) -> None:
    """Empty files of these names, so that the frontend does not mark the loaders as lacking theirs.

    But not of what another workflow saves.
    """
    for name in (name for name in files() if Path(name).name != SAVED_BY_DISTIL_MINI_LADD):
        (base_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / name).touch()
