"""The command ``cache``: the teacher's latents, or own pictures, as a dataset for ``train``."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from ..data import buckets
from ..data.cache import CacheConfig, cache_latents
from ..data.fits import check_sizes
from ..data.manifest import OtherDataset
from ..data.masks import ALPHA, FILES, NONE, MaskConfig, with_own_masks
from ..data.pictures import PictureConfig, survey
from ..data.real import cache_pictures
from ..data.shards import Progress
from ..digests import fingerprint
from ..models.denoiser import Denoiser, Guided
from ..models.pipelines import MiniSource, PipelineSource, open_source, read_prompts
from ..models.teachers import open_teacher
from ..settings import settings_of
from ..training.config import Config, load_config

KEYS = {
    **{f"config.{s.name}": f"[cache] {s.name}" for s in settings_of(CacheConfig)},
    **{f"pictures.{s.name}": f"[pictures] {s.name}" for s in settings_of(PictureConfig)},
    **{f"masks.{s.name}": f"[masks] {s.name}" for s in settings_of(MaskConfig)},
    "masks": "[masks] source",
    "guidance": "[cache] guidance",
    "embedded_guidance": "[cache] embedded_guidance",
    "dtype": "[pictures] dtype",
    "base": "[model] path",
    "autoencoder": "the VAE of [model] path",
    "content": "a picture or its caption",
    "prompts": "[prompts] prompts or negative",
    "negative": "[prompts] negative, or its text encoder,",
}


def run_cache(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    source = open_source(config.model, config.cache.embedded_guidance)
    try:
        if args.images:
            _from_pictures(args, config, source)
        else:
            _from_teacher(args, config, source)
    except OtherDataset as error:
        raise ValueError(error.said(KEYS, "choose another --out, or delete it to make it anew")) from None


def _from_teacher(args: argparse.Namespace, config: Config, source: MiniSource | PipelineSource) -> None:
    if config.masks.source != NONE:
        raise ValueError("masks are of own pictures: give --images FOLDER, or leave [masks] source out")
    check_sizes(config.cache.sizes, source.backend.limits())
    prompts = read_prompts(config.prompts.prompts, source)
    conds, uncond = source.encode(prompts, config.prompts.negative)
    other = open_teacher(config.teacher, config.model, source)
    teacher = Guided(other.view if other else Denoiser(source.backend), uncond, config.cache.guidance)
    text = "\n".join([*prompts, config.prompts.negative])
    made_from: dict[str, Any] = {
        "base": other.digest if other else fingerprint(source.backend.network),
        "prompts": hashlib.sha256(text.encode()).hexdigest(),
    }
    if uncond.guidance is not None:
        made_from["embedded_guidance"] = source.embedded_guidance
    show(cache_latents(teacher, conds, source.channels, config.cache, args.out, made_from), "cache: teacher latents")


def _from_pictures(args: argparse.Namespace, config: Config, source: MiniSource | PipelineSource) -> None:
    pictures, left_out = survey(args.images, config.pictures)
    if config.masks.source in (FILES, ALPHA):
        pictures, without = with_own_masks(pictures, config.masks, config.pictures)
        left_out |= without
    said = buckets.report(pictures, left_out, config.pictures)
    print(buckets.spell(said, config.train.batch_size, config.masks.each))
    _, uncond = source.encode([], config.prompts.negative)
    made_from: dict[str, Any] = {"autoencoder": source.autoencoder_identity()}
    if uncond.guidance is not None:
        made_from["embedded_guidance"] = source.embedded_guidance
    made = cache_pictures(
        pictures,
        left_out,
        source.encode_images,
        lambda items: source.encode([pictures[i].caption for i in items], config.prompts.negative)[0],
        uncond,
        args.out,
        config.pictures,
        made_from,
        source.scale,
        masks=config.masks,
        takes=source.backend.limits().items,
    )
    show(made, "cache: pictures")


def show(made: Iterable[Progress], what: str) -> None:
    """Make a dataset, with a progress bar."""
    with tqdm(desc=what) as bar:
        for done, total, _ in made:
            bar.total = total
            bar.update(done - bar.n)
