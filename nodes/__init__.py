"""The nodes of the pack, for ComfyUI's V3 API. Only this folder knows ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import doctor, mini, perceptual, sampling

WEB_DIRECTORY = "./web"
NODES: list[type[io.ComfyNode]] = [*sampling.NODES, *doctor.NODES, *mini.NODES, *perceptual.NODES]


class TurboDistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> TurboDistillExtension:
    return TurboDistillExtension()
