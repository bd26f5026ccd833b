"""Datasets made and opened with a MODEL of the host: its samples, or real images in its latent space."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...distill_core.data.cache import CacheConfig, write_shards
from ...distill_core.data.dataset import LatentDataset
from ...distill_core.data.real import save_latents
from ...distill_core.diffusion.schedules import check_sigmas, grid_sigmas, with_levels
from ...distill_core.methods.defaults import levels_for
from ...distill_core.models.denoiser import Cond
from .architectures import architecture_of
from .conditioning import check_places, cond_of
from .folders import dataset_folder
from .identity import family_name, identity
from .model import training_process_of
from .teacher import HostTeacher, one_entry

SIZES = re.compile(r"\s*(\d+)\s*[x×]\s*(\d+)\s*")
SHARD_SIZE = 256


def parse_sizes(text: str, scale: int) -> tuple[tuple[int, int], ...]:
    """ "1024x768, 512x512" (width x height, pixels) -> latent sizes [(H, W), ...].

    scale: pixels per latent position. Raises ValueError for anything else, and for sides that are not a multiple of
    2 * scale (networks take patches of 2 x 2).
    """
    sizes = []
    for part in text.split(","):
        match = SIZES.fullmatch(part)
        width, height = map(int, match.groups()) if match else (0, 0)
        if not width or not height or width % (2 * scale) or height % (2 * scale):
            raise ValueError(
                f"size {part.strip()!r}: write sizes like 1024x1024, 832x1216 in pixels, multiples of {2 * scale}"
            )
        sizes.append((height // scale, width // scale))
    return tuple(sizes)


def shard_count(name: str) -> int:
    """How many shards the dataset has on disk."""
    return len(list(dataset_folder(name).glob("shard-*.safetensors")))


def make_teacher_latents(
    model,
    positives: Sequence[list],
    dataset_name: str,
    *,
    count: int,
    sizes: str,
    steps: int,
    cfg: float,
    negative: list | None = None,
    pairs_for_steps: int = 0,
    sampler=None,
    sigmas: Tensor | None = None,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> Path:
    """Sample the MODEL ``count`` times into a dataset, or go on with one that was stopped; returns its folder.

    The arguments are the inputs of Teacher Latents. Raises ValueError for settings that cannot work together.
    """
    folder, process = dataset_folder(dataset_name), training_process_of(model)
    if pairs_for_steps and sampler is not None:
        raise ValueError("pairs need the node's own Euler sampler: disconnect SAMPLER, or set pairs_for_steps to 0")
    levels = levels_for(process, pairs_for_steps) if pairs_for_steps else ()
    grid = grid_sigmas(process, steps) if sigmas is None else check_sigmas(sigmas.float().cpu())
    grid = with_levels(grid, levels)
    config = CacheConfig(
        count=count,
        steps=len(grid) - 1,
        guidance=cfg,
        sizes=parse_sizes(sizes, model.get_model_object("latent_format").spacial_downscale_ratio),
        state_sigmas=levels,
        shard_size=max(batch_size, min(SHARD_SIZE, count)),
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
    )
    conds, uncond, description = training_conditionings(model, positives, negative)
    bar, done = comfy.utils.ProgressBar(count), 0

    def show(share: float, preview) -> None:
        bar.update_absolute(min(count, done + share * batch_size), count, preview)

    sampler = sampler or comfy.samplers.ksampler("euler")
    teacher = HostTeacher(
        model,
        positives,
        conds,
        negative=negative,
        cfg=cfg,
        sampler=sampler,
        sigmas=grid,
        sizes=config.sizes,
        seed=seed,
        state_sigmas=levels,
        progress=show,
    )
    description |= {
        "prompts": digest_of(conds),
        "sigmas": grid.tolist(),
        "sampler": getattr(sampler.sampler_function, "__name__", "custom"),
    }
    for done, _, _ in write_shards(teacher, uncond, cfg, config, folder, description):
        bar.update_absolute(done)
    return folder


def make_image_dataset(
    model,
    latents: Sequence[dict],
    positives: Sequence[list],
    dataset_name: str,
    *,
    negative: list | None = None,
    dtype: str = "bfloat16",
) -> Path:
    """Write LATENTs of real images as a dataset; returns its folder.

    positives: a CONDITIONING for each image, for each LATENT (all images of its batch), or one for all.
    Raises ValueError for latents of another model, and for counts that do not match.
    """
    folder, layout = dataset_folder(dataset_name), model.get_model_object("latent_format")
    images = [image for latent in latents for image in latent["samples"]]
    if len(positives) == len(latents):
        positives = [cond for cond, latent in zip(positives, latents, strict=True) for _ in latent["samples"]]
    wrong = {len(image) for image in images} - {layout.latent_channels}
    if wrong:
        raise ValueError(
            f"the latents have {sorted(wrong)[0]} channels, but this model's have {layout.latent_channels}: encode "
            "the images with this model's own VAE"
        )
    conds, uncond, description = training_conditionings(model, positives, negative)
    scaled = [model.model.process_latent_in(image.unsqueeze(0).float())[0].cpu() for image in images]
    single = [image[:, 0] if image.ndim == 4 and image.shape[1] == 1 else image for image in scaled]
    save_latents(single, conds, uncond, folder, description, dtype)
    return folder


def training_conditionings(model, positives: Sequence[list], negative: list | None) -> tuple[list[Cond], Cond, dict]:
    """One row for each positive, the negative (zeros where there is none), and which model they are for.

    Raises ValueError for conditionings that cannot be distilled.
    """
    conds = [cond_of([one_entry(conditioning)]).to("cpu") for conditioning in positives]
    uncond = cond_of([one_entry(negative, "negative")]).to("cpu") if negative else conds[0].map(torch.zeros_like)
    architecture = architecture_of(model.model.diffusion_model)
    for cond in (*conds, uncond):
        check_places(cond, architecture)
    return conds, uncond, {"family": family_name(model), "base": identity(model)}


def digest_of(conds: Sequence[Cond]) -> str:
    """A hash of the prompts' conditionings."""
    digest = hashlib.sha256()
    for cond in conds:
        for value in cond.tensors().values():
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_dataset(folder: Path, model, pairs: bool) -> LatentDataset:
    """The dataset in ``folder``, checked against the MODEL that is to be trained on it.

    Raises ValueError for one of another family or channel count and, with ``pairs``, for one of another teacher.
    """
    dataset = LatentDataset(folder)
    manifest, family = dataset.manifest(), family_name(model)
    channels, wanted = dataset.shapes[0][0], model.get_model_object("latent_format").latent_channels
    if manifest.get("family") != family or channels != wanted:
        raise ValueError(
            f"the dataset {folder.name} was made for {manifest.get('family', 'another family')} ({channels} latent "
            f"channels), but the model is {family} ({wanted} channels): make the dataset with this model"
        )
    if pairs and dataset.state_sigmas and manifest.get("base") != identity(model):
        raise ValueError(
            f"the pairs in {folder.name} are paths of another model than the one connected (another checkpoint, or "
            "other LoRAs on it): connect the teacher that made them, make them again, or set pairs_weight to 0"
        )
    return dataset
