"""Imported first by the probes: makes this process the host's. The script's argument is the folder for its files."""

import os
import sys
from pathlib import Path

from launch import ImportHooks, load_pack

sys.meta_path.insert(0, ImportHooks())
sys.path.insert(0, str(Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()))
folder = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402, F401
import comfy_api.latest  # noqa: E402, F401

load_pack("pack")
