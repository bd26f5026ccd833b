"""Whether a dataset is for the model that is to be trained on it: its teacher, its latents, its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ..models.denoiser import Limits
from ..models.items import missing
from .dataset import LatentDataset


def check_teacher(dataset: LatentDataset, base: str) -> None:
    """Raises ValueError for pairs that are paths of another model than ``base``, where the dataset says whose they are.

    Latents without pairs may be of any model: then they are pictures to learn from.
    """
    for member in dataset.members:
        made_by = member.manifest().get("base")
        if member.state_sigmas and made_by not in (None, base):
            raise ValueError(
                f"the pairs in {member.folder} are paths of another model (its base is {made_by}, this one is {base}: "
                "another checkpoint, precision, or other LoRAs on it): train on the model that made them, make them "
                "again, or set the weight of the pairs to 0"
            )


def check_fits(dataset: LatentDataset, limits: Limits, needs: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises ValueError for latents or text that the network cannot take: another family's, too large ones, or ones
    without the per-item tensors that it takes, or that a method ``needs`` (with how they are made)."""
    where, made = f"the dataset in {dataset.folder}", "make it with this model and its text encoders"
    for items in dataset.buckets.values():
        one = dataset.read(items[:1])
        channels, height, width = one.latents.shape[1:]
        if limits.channels not in (None, channels):
            raise ValueError(
                f"{where} has latents of {channels} channels, this model's have {limits.channels}: it was made for "
                f"another family of models; {made}"
            )
        if limits.side is not None and max(height, width) > limits.side:
            raise ValueError(
                f"{where} has latents of {width} x {height}, and this model knows no position beyond {limits.side}: "
                f"use pictures with sides of at most {8 * limits.side} pixels"
            )
        if limits.instead not in one.cond.extra and (lacking := missing(limits.items, one.cond.extra)):
            raise ValueError(
                f"{where} has no {lacking}, and this model takes {' and '.join(limits.items)} of every picture beside "
                "its latent; make it with them (masks: [masks] source; pictures to edit: [pictures] sources), or train "
                "on a model without such an input"
            )
        if lacking := missing(list(needs), one.beside):
            cures = " and ".join(cure for name, cure in needs.items() if name not in one.beside)
            raise ValueError(f"{where} has items without {lacking}, which this method learns from: {cures}")
        for name, text, wanted in (
            ("text tokens", one.cond.context, limits.context),
            ("a pooled text", one.cond.pooled, limits.pooled),
        ):
            found = 0 if text is None else text.shape[-1]
            if wanted and found != wanted:
                has = f"{name} of width {found}" if found else f"no {name.removeprefix('a ')}"
                raise ValueError(
                    f"{where} has {has}, this model takes {wanted}: its prompts were encoded for another family of "
                    f"models; {made}"
                )


def check_sizes(sizes: Iterable[tuple[int, int]], limits: Limits) -> None:
    """Raises ValueError for sizes [height, width] of latents that the network cannot take."""
    for height, width in sizes:
        if height % limits.patch or width % limits.patch:
            raise ValueError(
                f"[cache] sizes has [{height}, {width}], and this model takes latents whose sides are multiples of "
                f"{limits.patch}"
            )
        if limits.side is not None and max(height, width) > limits.side:
            raise ValueError(
                f"[cache] sizes has [{height}, {width}], and this model knows no position beyond {limits.side}"
            )
