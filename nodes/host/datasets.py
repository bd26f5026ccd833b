"""Datasets made and opened with a MODEL of the host: its samples, or real images in its latent space."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...distill_core.data.cache import CacheConfig, groups_by_length, write_shards
from ...distill_core.data.dataset import LatentDataset
from ...distill_core.data.fits import check_teacher
from ...distill_core.data.manifest import OtherDataset
from ...distill_core.data.mix import Mix, open_data
from ...distill_core.data.real import save_latents
from ...distill_core.diffusion.schedules import check_sigmas, grid_sigmas, with_levels
from ...distill_core.methods.defaults import levels_for
from ...distill_core.models.denoiser import Cond
from ...distill_core.training.progress import Pace
from .architectures import architecture_of
from .carried import check_teachable
from .conditioning import check_places, cond_of
from .folders import dataset_folder
from .glimpse import glimpse
from .identity import identity
from .items import check_dataset_items, check_told
from .model import family_name, training_process_of
from .teacher import HostTeacher, one_entry

SIZES = re.compile(r"\s*(\d+)\s*[x×]\s*(\d+)\s*")
SHARD_SIZE = 256  # items
ROUND, SMALLEST_SHARD = 64, 16  # of all sizes and lengths of prompts, where there are several
CONSOLE_EVERY, NODE_EVERY = 30.0, 2.0  # seconds between lines on how far it is


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


def sizes_of(folder: Path) -> str:
    """How many items a dataset has of each size, as text: "7 items in 2 sizes: 4 of 64x64, 3 of 80x48" latents."""
    counts: Counter[str] = Counter()
    for (_, height, width, *_), items in LatentDataset(folder).buckets.items():
        counts[f"{width}x{height}"] += len(items)
    listed = ", ".join(f"{count} of {size}" for size, count in counts.most_common(12))
    more = ", ..." if len(counts) > 12 else ""
    sizes = "1 size" if len(counts) == 1 else f"{len(counts)} sizes"
    return f"{counts.total()} items in {sizes} of latents: {listed}{more}"


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
    say: Callable[[str], object] = logging.info,
) -> Path:
    """Sample the MODEL ``count`` times into a dataset, or go on with one that was stopped; returns its folder.

    The arguments are the inputs of Teacher Latents; ``say`` shows on the node how far it is.
    Raises ValueError for settings that cannot work together.
    """
    folder, process = dataset_folder(dataset_name), training_process_of(model)
    check_teachable(model)
    if pairs_for_steps and sampler is not None:
        raise ValueError("pairs need the node's own Euler sampler: disconnect SAMPLER, or set pairs_for_steps to 0")
    levels = levels_for(process, pairs_for_steps) if pairs_for_steps else ()
    grid = grid_sigmas(process, steps) if sigmas is None else check_sigmas(sigmas.float().cpu())
    grid = with_levels(grid, levels)
    latent_sizes = parse_sizes(sizes, model.get_model_object("latent_format").spacial_downscale_ratio)
    conds, uncond, description = training_conditionings(model, positives, negative)
    check_told(model.model, conds)
    kinds = len(latent_sizes) * len(groups_by_length(conds))  # a shard holds one, and all are to have a turn soon
    config = CacheConfig(
        count=count,
        steps=len(grid) - 1,
        guidance=cfg,
        sizes=latent_sizes,
        state_sigmas=levels,
        shard_size=SHARD_SIZE if kinds == 1 else max(SMALLEST_SHARD, ROUND // kinds),
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
    )
    description |= {"prompts": digest_of(conds)}
    sampler = sampler or comfy.samplers.ksampler("euler")
    name = getattr(sampler.sampler_function, "__name__", "custom")
    teacher = HostTeacher(
        model,
        positives,
        conds,
        negative=negative,
        cfg=cfg,
        sampler=lambda random, noise: sampler,
        sigmas=grid,
        sizes=config.sizes,
        seed=seed,
        state_sigmas=levels,
    )
    try:
        sample_all(teacher, uncond, config, folder, description | {"sampler": name}, say)
    except OtherDataset as error:
        raise ValueError(in_widgets(error, model, process, steps if sigmas is None else None)) from None
    return folder


def sample_all(
    teacher: HostTeacher,
    uncond: Cond,
    config: CacheConfig,
    folder: Path,
    description: dict,
    say: Callable[[str], object],
) -> None:
    """Let a teacher fill a dataset's folder; the node's bar and previews, and ``say``, show how far it is."""
    bar, done = comfy.utils.ProgressBar(config.count), 0

    def show(share: float, preview) -> None:
        bar.update_absolute(min(config.count, done + share * config.batch_size), config.count, preview)

    teacher.progress = show
    paces = [Pace(f"teacher latents {folder.name}", CONSOLE_EVERY, logging.info), Pace("latents", NODE_EVERY, say)]
    description = {**description, "sigmas": teacher.sigmas.tolist()}
    for done, total, latents in write_shards(teacher, uncond, config.guidance, config, folder, description):
        bar.update_absolute(done, total, glimpse(teacher.layout, latents))
        for pace in paces:
            pace.there(done) if latents is None else pace(done, total)


CURE = "choose another dataset_name, or delete the folder to make it anew"
WIDGETS = {
    "config.state_sigmas": "pairs_for_steps",
    "config.guidance": "cfg",
    "guidance": "cfg",
    "base": "model (its weights, or the LoRAs on it)",
    "family": "model",
    "prompts": "positive",
    "sigmas": "sigmas (or the model's shift)",
    "content": "a picture or its conditioning",
}


def in_widgets(error: OtherDataset, model, process, steps: int | None) -> str:
    """What differs from the dataset that is there, with the names and values of the node's widgets.

    steps: of the node, None where its noise levels are connected.
    """
    changes, stored = error.changes, error.stored
    if "config.state_sigmas" in changes:
        now, before = changes["config.state_sigmas"]
        if len(now or ()) == len(before or ()):  # the same number of steps on another schedule
            changes["sigmas"] = changes.pop("config.state_sigmas")
        else:
            changes["config.state_sigmas"] = (len(now or ()), len(before or ()))
    if "config.sizes" in changes:
        scale = model.get_model_object("latent_format").spacial_downscale_ratio
        now, before = ([f"{w * scale}x{h * scale}" for h, w in sizes or ()] for sizes in changes["config.sizes"])
        changes["config.sizes"] = (", ".join(now), ", ".join(before))
    if changes.keys() & {"config.steps", "sigmas", "config.state_sigmas"}:
        # The stored grid has the levels of the pairs in it.
        before = widget_steps(process, stored.get("sigmas") or [], stored.get("state_sigmas") or [])
        asked = {"config.steps": (steps, before)} if steps and before and steps != before else {}
        moved = {} if steps and before else {"sigmas": ("", "")}
        changes = {k: v for k, v in changes.items() if k not in ("config.steps", "sigmas")} | asked | moved
    error.changes = changes
    return error.said(WIDGETS, CURE)


def widget_steps(process, grid: Sequence[float], levels: Sequence[float]) -> int | None:
    """The number of steps whose grid on the model's own schedule, with the levels in it, is this one; None if none."""
    wanted = torch.tensor(grid)
    for steps in range(1, len(grid)):
        made = with_levels(grid_sigmas(process, steps), levels)
        if len(made) == len(wanted) and torch.allclose(made, wanted, rtol=1e-3):
            return steps
    return None


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
    check_told(model.model, conds)
    scaled = [model.model.process_latent_in(image.unsqueeze(0).float())[0].cpu() for image in images]
    single = [image[:, 0] if image.ndim == 4 and image.shape[1] == 1 else image for image in scaled]
    try:
        save_latents(single, conds, uncond, folder, {"family": description["family"]}, dtype)
    except OtherDataset as error:
        raise ValueError(error.said(WIDGETS, CURE)) from None
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


def open_dataset(source: Path | Mix, model, pairs: bool) -> LatentDataset:
    """The dataset, or several mixed, checked against the MODEL that is to be trained on it.

    Raises ValueError for one of another family or channel count, for one without what the model takes of every picture
    and, with ``pairs``, for one of another teacher.
    """
    dataset, family = open_data(source), family_name(model)
    wanted = model.get_model_object("latent_format").latent_channels
    for member in dataset.members:
        made_for, channels = member.manifest().get("family"), member.shapes[0][0]
        if made_for != family or channels != wanted:
            raise ValueError(
                f"the dataset {member.folder.name} was made for {made_for or 'another family'} ({channels} latent "
                f"channels), but the model is {family} ({wanted} channels): make the dataset with this model"
            )
    check_dataset_items(model.model, dataset)
    if pairs:
        check_teacher(dataset, identity(model))
    return dataset
