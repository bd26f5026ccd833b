"""Start ComfyUI's main.py with the arguments given to this script.

Why not main.py itself: ComfyUI imports torchvision and torchaudio unconditionally, and the
builds of them on PyPI are linked against CUDA, so that with a CPU build of torch both fail at
import. Only their C++ parts are missing, and ComfyUI needs those for a few nodes only, so two
import hooks let the Python parts load without them. Where the C++ parts do load, the hooks
change nothing. They also never import torch themselves: ComfyUI has to be the first to do it.

ComfyUI is looked for in $COMFYUI_PATH, by default ~/comfy/ComfyUI.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
KEEP_ALIVE: list[Any] = []  # a torch.library.Library takes its schemas with it when it is freed


def define_missing_vision_ops() -> None:
    """Define the two operators torchvision expects to exist, if its C++ part did not load."""
    from torchvision import extension

    if not extension._has_ops():
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if hasattr(torch.ops.torchvision, name):  # of another package, or of an earlier call
                continue
            library.define(name + NMS_SCHEMA)
        KEEP_ALIVE.append(library)


def treat_broken_audio_libraries_as_absent(utils: ModuleType) -> None:
    """Make torchaudio's loader answer "not there" for a C++ library that does not load."""
    load = utils._load_lib

    def load_or_skip(name: str) -> bool:
        try:
            return load(name)
        except OSError:
            return False

    utils._load_lib = load_or_skip


class ImportHooks(MetaPathFinder):
    """Runs the two cures just before or just after the module that needs them is executed."""

    before = {"torchvision._meta_registrations": define_missing_vision_ops}
    after = {"torchaudio._extension.utils": treat_broken_audio_libraries_as_absent}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find a hooked module as usual and wrap its execution; leave all others alone."""
        if fullname not in self.before and fullname not in self.after:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if fullname in self.before:
                    self.before[fullname]()
                execute(module)
                if fullname in self.after:
                    self.after[fullname](module)

            spec.loader.exec_module = exec_module
        return spec


def load_pack(name: str) -> None:
    """Import this repository as a package ``name``, the way the host does; for scripts inside the host's Python."""
    root = Path(__file__).resolve().parents[2]
    spec = spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def comfyui_folder() -> Path:
    return Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser().resolve()


def enter_host(pack: str = "pack") -> None:
    """Make this process ComfyUI's, on the CPU and without a server, with this repository imported as ``pack``.

    Takes the script's own arguments off sys.argv, which the host would read. Needs ComfyUI's Python.
    """
    sys.meta_path.insert(0, ImportHooks())
    sys.path.insert(0, str(comfyui_folder()))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy_api.latest  # noqa: F401  the pack wants it loaded

    load_pack(pack)


def main() -> None:
    """Run main.py as if it had been started directly."""
    root = comfyui_folder()
    script = root / "main.py"
    if not script.is_file():
        sys.exit(f"no ComfyUI in {root}: set COMFYUI_PATH to its folder")
    sys.meta_path.insert(0, ImportHooks())
    sys.path[0] = str(root)
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
