"""What a teacher that edits makes of the sources and texts of a dataset, at strengths drawn for each item."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils

from ...distill_core.data.cache import CacheConfig, cache_latents
from ...distill_core.data.dataset import ItemConds
from ...distill_core.data.manifest import OtherDataset
from ...distill_core.data.mix import Mix
from ...distill_core.methods.defaults import levels_for
from ...distill_core.models.denoiser import Denoiser
from ...distill_core.models.guidance import guided
from ...distill_core.models.items import REFERENCE, SOURCE_IMAGE
from ...distill_core.training.progress import Pace
from .backend import training_backend
from .datasets import CONSOLE_EVERY, CURE, NODE_EVERY, open_dataset
from .datasets import WIDGETS as OF_DATASETS
from .folders import dataset_folder
from .glimpse import glimpse
from .identity import identity
from .items import items_of, takes_references
from .model import family_name, training_process_of

WIDGETS = OF_DATASETS | {
    "config.text_strength": "text_strength_low or text_strength_high",
    "config.image_strength": "image_strength_low or image_strength_high",
    "items": "pairs",
}


def make_edits(
    model,
    pairs: Path | Mix,
    dataset_name: str,
    *,
    count: int,
    steps: int,
    text: tuple[float, float],
    image: tuple[float, float],
    pairs_for_steps: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "bfloat16",
    say: Callable[[str], object] = logging.info,
) -> Path:
    """Let the MODEL edit the sources of a dataset ``count`` times, in turn; returns the folder of its edits.

    The command's `cache --data`: item i has the text and the source of pair i mod their number, noise of its own, and
    strengths drawn from ``text`` and ``image``, each the lowest and the highest. One that was stopped goes on where it
    was. Raises ValueError for a model that edits no picture, and for pairs or settings that do not fit.
    """
    if not takes_references(model.model) and SOURCE_IMAGE not in items_of(model.model):
        raise ValueError("this model edits no picture: load one that does, or use Teacher Latents")
    folder, process = dataset_folder(dataset_name), training_process_of(model)
    dataset = open_dataset(pairs, model, pairs=False)
    if not {SOURCE_IMAGE, REFERENCE} & set(dataset.conditions):
        raise ValueError("these items have no picture to edit: make them with source_folder of Picture Folder")
    height, width = dataset.read(dataset.largest[:1]).latents.shape[2:]
    if others := len(dataset) - len(dataset.largest):
        say(f"{others} pairs of other sizes are left out")
    config = CacheConfig(
        count=count,
        steps=steps,
        guidance=sum(text) / 2,
        text_strength=text,
        image_strength=image,
        sizes=((height, width),),
        state_sigmas=levels_for(process, pairs_for_steps) if pairs_for_steps else (),
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
    )
    description = {"family": family_name(model), "base": identity(model), "items": dataset.digest()}
    layout, bar = model.get_model_object("latent_format"), comfy.utils.ProgressBar(count)
    paces = [Pace(f"edits {folder.name}", CONSOLE_EVERY, logging.info), Pace("edits", NODE_EVERY, say)]
    try:
        with training_backend(model, checkpointing=False) as backend:
            device = model.load_device
            teacher = guided(Denoiser(backend), dataset.uncond().to(device), config.guidance)
            conds = ItemConds(dataset, dataset.largest, device)
            for done, total, latents in cache_latents(teacher, conds, backend.channels, config, folder, description):
                bar.update_absolute(done, total, glimpse(layout, latents))
                for pace in paces:
                    pace.there(done) if latents is None else pace(done, total)
                comfy.model_management.throw_exception_if_processing_interrupted()
    except OtherDataset as error:
        raise ValueError(error.said(WIDGETS, CURE)) from None
    return folder
