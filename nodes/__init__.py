"""The nodes of the pack, for ComfyUI's V3 API. What else knows ComfyUI is in ``host``."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    compare,
    datasets,
    doctor,
    edits,
    mini,
    mix,
    perceptual,
    pictures,
    prompts,
    results,
    retention,
    sampling,
    scenes,
    strengths,
    variety,
)
from .errors import in_words
from .trainers import adapter as adapter_trainer
from .trainers import add as add_trainer
from .trainers import diffusion2gan as diffusion2gan_trainer
from .trainers import dmd2 as dmd2_trainer
from .trainers import dpo as dpo_trainer
from .trainers import ladd as ladd_trainer
from .trainers import settings as trainer_settings
from .trainers import tune as tune_trainer

WEB_DIRECTORY = "./web"
TRAINERS = (ladd_trainer, add_trainer, diffusion2gan_trainer, dmd2_trainer, tune_trainer, adapter_trainer, dpo_trainer)
FILES = (
    *(sampling, variety, strengths, doctor, prompts, datasets, pictures, edits, mix),
    *(*TRAINERS, trainer_settings, results, compare, retention, perceptual, mini, scenes),
)
NODES: list[type[io.ComfyNode]] = [node for file in FILES for node in file.NODES]


class TurboDistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [in_words(node) for node in NODES]


async def comfy_entrypoint() -> TurboDistillExtension:
    return TurboDistillExtension()
