"""Entry point for ComfyUI, which imports this folder as a package; the headless core is `distill_core`."""

import sys

# pytest imports this file, too, as a package of the folder's name or a plain module; only the host has its API loaded.
if __package__ and "comfy_api" in sys.modules:
    from .nodes import WEB_DIRECTORY, comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
