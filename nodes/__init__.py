"""The nodes of the pack, for ComfyUI's V3 API. Only this folder knows ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import datasets, doctor, mini, perceptual, results, sampling, training

WEB_DIRECTORY = "./web"
FILES = (sampling, doctor, datasets, training, results, mini, perceptual)
NODES: list[type[io.ComfyNode]] = [node for file in FILES for node in file.NODES]


class TurboDistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> TurboDistillExtension:
    return TurboDistillExtension()
