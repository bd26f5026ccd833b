"""ComfyUI-GGUF (github.com/city96/ComfyUI-GGUF), the best-known loader of GGUF files, where it is at hand.

$COMFYUI_GGUF_PATH (default ~/comfy/ComfyUI-GGUF) is its folder; ComfyUI's Python needs the gguf package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACK = Path(os.environ.get("COMFYUI_GGUF_PATH") or "~/comfy/ComfyUI-GGUF").expanduser()
HOW_TO = (
    "ComfyUI-GGUF not found, so no GGUF file was opened by its real loader: put github.com/city96/ComfyUI-GGUF "
    "into ~/comfy/ComfyUI-GGUF or say where it is in COMFYUI_GGUF_PATH, and pip install gguf into ComfyUI's Python"
)


def found(python: Path) -> bool:
    """Whether the pack is there, and what it imports in that Python."""
    command = [python, "-c", "import gguf"]
    return (PACK / "nodes.py").is_file() and subprocess.run(command, capture_output=True).returncode == 0


def pack():
    """The pack as a module; inside the host's Python."""
    if "comfyui_gguf" not in sys.modules:
        spec = spec_from_file_location("comfyui_gguf", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
        sys.modules["comfyui_gguf"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["comfyui_gguf"])
    return sys.modules["comfyui_gguf"]


def gguf_model(path: Path):
    """A MODEL as the pack's loader node gives it; inside the host's Python."""
    import folder_paths
    import torch

    folder_paths.add_model_folder_path("unet", str(path.parent))
    with torch.inference_mode():
        return pack().NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(path.name)[0]
