"""A dataset from latents and conditionings that are already there: real images instead of the teacher's."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import DTYPES, save_tensors
from ..models.denoiser import Cond, cat_conds
from .cache import write_manifest

SHARD_SIZE = 256


def save_latents(
    latents: Sequence[Tensor],
    conds: Sequence[Cond],
    uncond: Cond,
    folder: str | Path,
    description: dict | None = None,
    dtype: str = "float32",
) -> int:
    """Write latents [C, H, W] (model space) with one conditioning row each as a dataset; returns their number.

    A shard holds one latent size and one number of text tokens. Raises ValueError when the counts differ (one
    conditioning serves all), channels differ, a latent is not finite, or the folder holds another dataset.
    """
    conds = list(conds) * len(latents) if len(conds) == 1 else list(conds)
    check_items(latents, conds)
    digest = hashlib.sha256()
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, (latent, cond) in enumerate(zip(latents, conds, strict=True)):
        groups[(tuple(latent.shape), tuple(cond.context.shape))].append(index)
        for tensor in (latent, *cond.tensors().values()):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    folder = Path(folder)
    manifest = {"guidance": 1.0, "state_sigmas": [], "content": digest.hexdigest(), "dtype": dtype}
    write_manifest(folder, manifest | (description or {}))
    save_tensors(folder / "uncond.safetensors", uncond.tensors())
    parts = [group[a : a + SHARD_SIZE] for group in groups.values() for a in range(0, len(group), SHARD_SIZE)]
    for number, part in enumerate(parts):
        path = folder / f"shard-{number:05d}.safetensors"
        if not path.exists():
            joined = cat_conds([conds[i] for i in part]).tensors()
            tensors = {"latents": torch.stack([latents[i] for i in part]), **joined}
            save_tensors(path, {k: v.to(DTYPES[dtype]) for k, v in tensors.items()}, {"state_sigmas": "[]"})
    return len(latents)


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
