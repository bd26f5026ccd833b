"""The command ``cache``: the teacher's latents, or own pictures, as a dataset for ``train``."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..data import buckets
from ..data.cache import CacheConfig, cache_latents
from ..data.dataset import ItemConds, LatentDataset
from ..data.fits import check_fits, check_sizes
from ..data.manifest import OtherDataset
from ..data.masks import ALPHA, FILES, NONE, MaskConfig, with_own_masks
from ..data.pictures import PictureConfig, survey
from ..data.preference import PreferenceConfig, cache_pairs, with_rejected
from ..data.real import cache_pictures
from ..data.shards import Progress
from ..data.sources import with_sources
from ..digests import file_digest, fingerprint
from ..models.denoiser import Cond, Denoiser
from ..models.guidance import edits, guided
from ..models.pipelines import MiniSource, PipelineSource, open_source, read_prompts
from ..models.scorers import CLASSIFIER, open_scorer, scored
from ..models.teachers import open_teacher
from ..settings import settings_of
from ..training.config import Config, load_config

KEYS = {
    **{f"config.{s.name}": f"[cache] {s.name}" for s in settings_of(CacheConfig)},
    **{f"pictures.{s.name}": f"[pictures] {s.name}" for s in settings_of(PictureConfig)},
    **{f"masks.{s.name}": f"[masks] {s.name}" for s in settings_of(MaskConfig)},
    **{f"preference.{s.name}": f"[preference] {s.name}" for s in settings_of(PreferenceConfig)},
    "masks": "[masks] source",
    "preference": "[preference] samples",
    "scorer": "[preference] scorer",
    "guidance": "[cache] guidance",
    "embedded_guidance": "[cache] embedded_guidance",
    "dtype": "[pictures] dtype",
    "base": "[model] path",
    "autoencoder": "the VAE of [model] path",
    "content": "a picture or its caption",
    "items": "--data",
    "prompts": "[prompts] prompts or negative",
    "negative": "[prompts] negative, or its text encoder,",
}


def run_cache(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    if config.pictures.rejected and not args.images:
        raise ValueError("[pictures] rejected has the worse ones of the pictures in --images FOLDER: give both")
    source = open_source(config.model, config.cache.embedded_guidance)
    try:
        if args.images and args.data:
            raise ValueError("--images encodes pictures, and --data samples the teacher for items: give one of them")
        if args.images:
            _from_pictures(args, config, source)
        else:
            _from_teacher(args, config, source)
    except OtherDataset as error:
        raise ValueError(error.said(KEYS, "choose another --out, or delete it to make it anew")) from None


def _from_teacher(args: argparse.Namespace, config: Config, source: MiniSource | PipelineSource) -> None:
    if config.masks.source != NONE and not args.data:
        raise ValueError("masks are of own pictures: give --images FOLDER, or leave [masks] source out")
    cache, prompts = config.cache, list[str]()
    conds: Cond | ItemConds
    if args.data and config.preference.samples:
        raise ValueError("[preference] samples ranks samples of prompts: leave --data out, or set samples = 0")
    if args.data:
        dataset = LatentDataset(args.data)
        check_fits(dataset, source.backend.limits())
        conds, uncond = ItemConds(dataset, dataset.largest, source.device), dataset.uncond().to(source.device)
        asked = {"items": dataset.digest()}
        height, width = dataset.read(dataset.largest[:1]).latents.shape[2:]
        cache = replace(cache, sizes=((height, width),))
        if others := len(dataset) - len(conds):
            print(f"note: {others} items of other sizes in {args.data} are left out", file=sys.stderr)
    else:
        check_sizes(cache.sizes, source.backend.limits())
        prompts = read_prompts(config.prompts.prompts, source)
        conds, uncond = source.encode(prompts, config.prompts.negative)
        text = "\n".join([*prompts, config.prompts.negative])
        asked = {"prompts": hashlib.sha256(text.encode()).hexdigest()}
    other = open_teacher(config.teacher, config.model, source)
    view = other.view if other else Denoiser(source.backend)
    check_strengths(cache, view)
    made_from: dict[str, Any] = {"base": other.digest if other else fingerprint(source.backend.network), **asked}
    if uncond.guidance is not None:
        made_from["embedded_guidance"] = source.embedded_guidance
    teacher, channels = guided(view, uncond, cache.guidance), source.channels
    if not config.preference.samples:
        show(cache_latents(teacher, conds, channels, cache, args.out, made_from), "cache: teacher latents")
        return
    name = config.preference.scorer
    scorer = open_scorer(name, config.model.path)
    made_from["scorer"] = name if name == CLASSIFIER else file_digest(name)

    def score(latents: Tensor, items: Sequence[int]) -> Tensor:
        return scored(scorer, source.decode(latents), [prompts[i % len(prompts)] for i in items])

    made = cache_pairs(teacher, conds, channels, cache, config.preference, score, args.out, made_from)
    show(made, "cache: pairs")


def check_strengths(config: CacheConfig, teacher: Denoiser) -> None:
    """Raises ValueError for strengths of a teacher that edits no picture."""
    if (config.text_strength or config.image_strength) and not edits(teacher):
        raise ValueError(
            "[cache] text_strength and image_strength are of a model that edits a picture, and this one takes none: "
            "set [cache] guidance"
        )


def _from_pictures(args: argparse.Namespace, config: Config, source: MiniSource | PipelineSource) -> None:
    pictures, left_out = survey(args.images, config.pictures)
    if config.masks.source in (FILES, ALPHA):
        pictures, without = with_own_masks(pictures, config.masks, config.pictures)
        left_out |= without
    if config.pictures.sources:
        pictures, without = with_sources(pictures, config.pictures.sources)
        left_out |= without
    if config.pictures.rejected:
        if config.masks.source != NONE:
            raise ValueError("pairs have no masks: leave [pictures] rejected or [masks] source out")
        pictures, without = with_rejected(pictures, config.pictures)
        left_out |= without
    said = buckets.report(pictures, left_out, config.pictures)
    limits = source.backend.limits()
    print(buckets.spell(said, config.train.batches(limits), config.masks.each, limits.pixels))
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
