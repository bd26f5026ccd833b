"""The nodes of the pack, for ComfyUI's V3 API. What else knows ComfyUI is in ``host``."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import datasets, doctor, mini, perceptual, results, sampling
from .trainers import add as add_trainer
from .trainers import diffusion2gan as diffusion2gan_trainer
from .trainers import ladd as ladd_trainer

WEB_DIRECTORY = "./web"
TRAINERS = (ladd_trainer, add_trainer, diffusion2gan_trainer)
FILES = (sampling, doctor, datasets, *TRAINERS, results, perceptual, mini)
NODES: list[type[io.ComfyNode]] = [node for file in FILES for node in file.NODES]


class TurboDistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> TurboDistillExtension:
    return TurboDistillExtension()
