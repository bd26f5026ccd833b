"""A dataset of real images instead of the teacher's: from latents that are already there, or from picture files."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import alone_in
from ..models.denoiser import Cond, cat_conds
from ..models.items import EXTRA, MASK, MASKED_IMAGE, PIXEL_MASK, REFERENCE, REJECTED, SOURCE_IMAGE
from .buckets import differences, report, save
from .manifest import OtherDataset, begin
from .masks import ALPHA, NONE, MaskConfig, for_latents, for_pixels, hidden, masks_of
from .pictures import Picture, PictureConfig, by_bucket, read_file_into, read_into
from .shards import Progress, Shard, fill

SHARD_SIZE = 256
OF_LATENTS = ("size", "step", "ratio", "background")  # settings that decide what a picture becomes
OTHER_PICTURES = {EXTRA + SOURCE_IMAGE: "source", REJECTED: "rejected"}  # tensors of an item, and the fields of Picture
OF_A_MODEL = ("base",)  # said by datasets of before version 0.3; pictures are of a latent space, not of a model


def save_latents(
    latents: Sequence[Tensor],
    conds: Sequence[Cond],
    uncond: Cond,
    folder: str | Path,
    description: dict | None = None,
    dtype: str = "float32",
) -> int:
    """Write latents [C, H, W] (model space) with one conditioning row each as a dataset; returns their number.

    Per-item tensors (`items.ITEM_TENSORS`) are those of the conditionings. A shard holds one latent size and one shape
    of each tensor of a conditioning. Raises ValueError when the counts differ (one conditioning serves all), channels
    differ, a latent is not finite, a per-item tensor is not as declared, or the folder holds another dataset.
    """
    conds = list(conds) * len(latents) if len(conds) == 1 else list(conds)
    check_items(latents, conds)
    digest = hashlib.sha256()
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, (latent, cond) in enumerate(zip(latents, conds, strict=True)):
        shapes = [(name, tuple(value.shape)) for name, value in cond.tensors().items()]
        groups[(tuple(latent.shape), *shapes)].append(index)
        for tensor in (latent, *cond.tensors().values()):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    folder = Path(folder)
    manifest = {"guidance": 1.0, "state_sigmas": [], "content": digest.hexdigest(), "dtype": dtype}
    parts = [group[a : a + SHARD_SIZE] for group in groups.values() for a in range(0, len(group), SHARD_SIZE)]
    plan = [Shard(part, (latents[part[0]].shape[1], latents[part[0]].shape[2])) for part in parts]

    def make(items: Sequence[int], shard: int) -> dict[str, Tensor]:
        return {"latents": torch.stack([latents[i] for i in items]), **cat_conds([conds[i] for i in items]).tensors()}

    with alone_in(folder, "writing a dataset"):
        begin(folder, manifest | (description or {}), uncond, OF_A_MODEL)
        for _ in fill(folder, plan, make, SHARD_SIZE, dtype, {"state_sigmas": "[]"}):
            pass
    return len(latents)


def cache_pictures(
    pictures: list[Picture],
    left_out: dict[str, str],
    encode: Callable[[Tensor], Tensor],
    conds_of: Callable[[Sequence[int]], Cond],
    uncond: Cond,
    folder: str | Path,
    config: PictureConfig,
    description: dict,
    scale: int = 8,
    lengths: Sequence[int] | None = None,
    masks: MaskConfig = MaskConfig(),
    takes: Sequence[str] = (MASK, MASKED_IMAGE),
) -> Iterator[Progress]:
    """Encode picture files as a dataset, with the report of their sizes beside it; goes on where it was stopped.

    encode: images [B, 3, H, W] in [-1, 1] -> latents of the model.  conds_of: numbers of pictures -> their rows.
    description: anything JSON that must agree when it goes on, the autoencoder above all.  scale: pixels of one
    position of a latent.  lengths: tokens of each caption where they differ.  masks: of an inpainting model's pictures;
    an item then has its mask and the latent of the picture that it hides a part of. Where the pictures have sources, an
    item has the latent of its own, and likewise where they have rejected ones.  takes: per-item tensors of the model;
    one of `PIXEL_MASK` gets the mask in pixels, and one of `REFERENCE` the source under that name.
    Raises OtherDataset, which names the pictures that are other ones now.
    """
    folder, said = Path(folder), report(pictures, left_out, config)
    content = hashlib.sha256(json.dumps(said["files"], sort_keys=True).encode()).hexdigest()
    settings = {name: getattr(config, name) for name in OF_LATENTS}
    manifest = {"guidance": 1.0, "state_sigmas": [], "content": content, "pictures": settings, "dtype": config.dtype}
    masked, mask = masks.source != NONE, PIXEL_MASK if PIXEL_MASK in takes else MASK
    others = {name: field for name, field in OTHER_PICTURES.items() if getattr(pictures[0], field) is not None}
    if REFERENCE in takes and EXTRA + SOURCE_IMAGE in others:  # it is told the same picture in another way
        others[EXTRA + REFERENCE] = others.pop(EXTRA + SOURCE_IMAGE)
    if masked:
        manifest["masks"] = masks.description() | ({"of": mask} if mask != MASK else {})
    background = None if masks.source == ALPHA else config.background  # what is hidden is learnt from
    groups: dict[tuple, list[int]] = defaultdict(list)
    for bucket, numbers in by_bucket(pictures, config).items():
        for number in numbers:
            own = [number + copy * len(pictures) for copy in range(masks.each)]
            groups[(bucket, lengths[number] if lengths else 0)] += own
    parts = [
        (bucket, group[a : a + SHARD_SIZE])
        for (bucket, _), group in groups.items()
        for a in range(0, len(group), SHARD_SIZE)
    ]

    def make(items: Sequence[int], shard: int) -> dict[str, Tensor]:
        bucket, numbers = parts[shard][0], [i % len(pictures) for i in items]
        images = torch.stack([read_into(pictures[number], bucket, background) for number in numbers])
        # In batches of other sizes an encoder rounds otherwise, and the copies of a picture are to have one latent.
        at_once = 1 if masks.each > 1 else len(images)
        latents = torch.cat([encode(part).float().cpu() for part in images.split(at_once)])
        made = {"latents": latents, **conds_of(numbers).to("cpu").tensors()}
        for name, field in others.items():
            files = [getattr(pictures[number], field) for number in numbers]
            read = [read_file_into(file, bucket, config.background) for file in files]
            made[name] = encode(torch.stack(read)).float().cpu()
        if masked:
            drawn = masks_of(masks, pictures, items, bucket)
            made[EXTRA + MASKED_IMAGE] = encode(hidden(images, drawn)).float().cpu()
            made[EXTRA + mask] = for_latents(drawn, scale) if mask == MASK else for_pixels(drawn)
        return made

    with alone_in(folder, "caching"):
        try:
            begin(folder, manifest | description, uncond)
        except OtherDataset as error:
            told = differences(folder, said) if "content" in error.changes else ""
            raise OtherDataset(folder, error.changes, error.stored, {"content": told} if told else {}) from None
        save(folder, said)
        plan = [Shard(group, (height // scale, width // scale)) for (width, height), group in parts]
        needs = ["latents", "context", *([EXTRA + mask, EXTRA + MASKED_IMAGE] if masked else []), *others]
        metadata = {"state_sigmas": "[]"}
        yield from fill(folder, plan, make, config.batch_size, config.dtype, metadata, needs, "the VAE")


def check_items(latents: Sequence[Tensor], conds: Sequence[Cond]) -> None:
    """Raises ValueError for counts, channels or values that cannot be a dataset."""
    if len(latents) != len(conds) or not latents:
        raise ValueError(
            f"{len(latents)} latents but {len(conds)} conditionings: give one conditioning for each latent, or one for "
            "all of them"
        )
    channels = {latent.shape[0] for latent in latents}
    if len(channels) > 1 or any(latent.ndim != 3 for latent in latents):
        shapes = sorted({tuple(latent.shape) for latent in latents})
        raise ValueError(f"the latents are of different kinds {shapes}: encode all images with the model's own VAE")
    bad = [i for i, latent in enumerate(latents) if not latent.isfinite().all()]
    if bad:
        raise ValueError(f"latent {bad[0]} has values that are not finite; leave it out or encode it again")
