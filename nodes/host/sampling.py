"""Our samplers run by the host's guider, with its model loading, hooks, masks, previews and progress bar."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...distill_core.diffusion.noise import ItemNoise
from ...distill_core.diffusion.samplers import SAMPLERS, NoiseSampler
from ...distill_core.presets.recipe import Recipe
from .model import process_of


class HostDenoiser:
    """The host's model as samplers get it, with the ``process`` that ours ask for."""

    def __init__(self, model) -> None:
        self.model = model
        self.process = process_of(model.inner_model.model_patcher)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args) -> Tensor:
        return self.model(x, sigma, **extra_args)


def host_sampler(
    name: str, options: dict[str, float], noise_sampler: NoiseSampler | None = None, first_item: int = 0
) -> comfy.samplers.KSAMPLER:
    """One of ``samplers.SAMPLERS`` as the host's SAMPLER.

    Noise is drawn by ``noise_sampler``, else for each row of a batch from (the run's seed + 1, first_item + row). On a
    CPU the network runs for one row at a time, so that not even its rounding depends on the batch.
    """
    function = SAMPLERS[name]

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None) -> Tensor:
        extra_args, noise = extra_args or {}, noise_sampler
        if noise is None:
            items = ItemNoise((extra_args.get("seed") or 0) + 1, range(first_item, first_item + len(x)))
            noise = lambda sigma, sigma_next: items.normal_like(x)  # noqa: E731
        if x.device.type == "cpu":
            extra_args = {**extra_args, "model_options": row_by_row(extra_args.get("model_options", {}))}
        return function(HostDenoiser(model), x, sigmas, extra_args, callback, disable, noise_sampler=noise, **options)

    return comfy.samplers.KSAMPLER(sample)


def row_by_row(model_options: dict) -> dict:
    """Model options that make the network process one row at a time, whatever the host puts into one batch.

    Matrix products of different heights round differently, so an image would depend on the rest of its batch.
    """
    inner = model_options.get("model_function_wrapper")

    def call(apply_model, args: dict) -> Tensor:
        count, groups = len(args["input"]), len(args["cond_or_uncond"])
        outputs = []
        for row in range(count):
            group = slice(row * groups // count, row * groups // count + 1)
            pick = lambda value: _row_of(value, row, count)  # noqa: B023, E731
            cond = {key: pick(value) for key, value in args["c"].items() if key != "transformer_options"}
            options = dict(args["c"].get("transformer_options", {}))
            options |= {key: options[key][group] for key in ("cond_or_uncond", "uuids") if key in options}
            options |= {"sigmas": pick(args["timestep"])}
            single = {
                "input": pick(args["input"]),
                "timestep": pick(args["timestep"]),
                "c": {**cond, "transformer_options": options},
                "cond_or_uncond": args["cond_or_uncond"][group],
            }
            if inner is None:
                outputs.append(apply_model(single["input"], single["timestep"], **single["c"]))
            else:
                outputs.append(inner(apply_model, single))
        return torch.cat(outputs)

    return {**model_options, "model_function_wrapper": call}


def _row_of(value, row: int, count: int):
    """The part of a conditioning that belongs to one row: tensors with a batch of ``count`` are cut, also in lists."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.ndim and len(value) == count else value
    if isinstance(value, (list, tuple)):
        return type(value)(_row_of(part, row, count) for part in value)
    if isinstance(value, dict):
        return {key: _row_of(part, row, count) for key, part in value.items()}
    return value


def batch_items(latent: dict, batch: int) -> Sequence[int]:
    """The index of every row in its original batch (LatentFromBatch keeps it), or else in this one."""
    items = latent.get("batch_index")
    return items if items is not None and len(items) == batch else range(batch)


def is_video(samples: Tensor) -> bool:
    """Whether latents [B, C, T, H, W] have more than one frame."""
    return samples.ndim == 5 and samples.shape[2] > 1


def fitting_latent(model, latent: dict) -> Tensor:
    """The latent tensor in the layout of MODEL; empty latents are adapted as the host's samplers do.

    Raises ValueError for a latent that holds a picture of another kind of model, and for packed audio and video.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError(
            "packed audio-video latents are not supported: use SamplerCustomAdvanced with Turbo Sampler Select"
        )
    ratios = (latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    samples = comfy.sample.fix_empty_latent_channels(model, samples, *ratios)
    layout = model.get_model_object("latent_format")
    if samples.shape[1] != layout.latent_channels:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, but this model's latents have {layout.latent_channels}: "
            "encode the image with this model's own VAE"
        )
    if samples.ndim != layout.latent_dimensions + 2:
        raise ValueError(
            f"the latent is {'a video' if samples.ndim == 5 else 'an image'} of shape {tuple(samples.shape)}, which "
            "this model does not take; use the empty latent node of its family"
        )
    return samples


def sample_latent(model, positive, negative, *, latent: dict, recipe: Recipe, seed: int) -> tuple[dict, dict]:
    """Run a recipe on a LATENT: the sampled LATENT and the last denoised one.

    All noise of row i comes from (seed, its batch index), so that it can be remade alone. Where the mask is 0 the
    latent comes back as it was, to the last bit. Raises ValueError for a cfg other than 1 without a negative.
    """
    samples = fitting_latent(model, latent)
    noise = ItemNoise(seed, batch_items(latent, len(samples)))
    initial = noise.normal(*samples.shape[1:])
    injected = lambda sigma, sigma_next: noise.normal_like(initial).to(model.load_device)  # noqa: E731
    sampler = host_sampler(recipe.sampler, recipe.sampler_options, injected)
    guider = _guider(model, positive, negative, recipe.cfg)
    mask, last = latent.get("noise_mask"), {}
    callback = latent_preview.prepare_callback(model, len(recipe.sigmas) - 1, last)
    sampled = guider.sample(
        initial,
        samples,
        sampler,
        recipe.sigmas,
        denoise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    denoised = model.model.process_latent_out(last["x0"].to(torch.float32))
    return tuple(_wrap(latent, result, samples, mask) for result in (sampled, denoised))


def _guider(model, positive, negative, cfg: float) -> comfy.samplers.CFGGuider:
    if cfg != 1 and negative is None:
        raise ValueError(f"cfg {cfg:g} needs a negative conditioning: connect one, or set cfg to 1")
    guider = comfy.samplers.CFGGuider(model)
    conds = {"positive": positive} if cfg == 1 else {"positive": positive, "negative": negative}
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    return guider


def _wrap(latent: dict, result: Tensor, original: Tensor, mask: Tensor | None) -> dict:
    """A LATENT with ``result`` in it, and the kept part as it was: the model's units and back cost its last bit."""
    result = result.to(comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype())
    if mask is not None:
        keep = comfy.sampler_helpers.prepare_mask(mask, original.shape, result.device) == 0
        result = torch.where(keep, original.to(result), result)
    dropped = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return {**{key: value for key, value in latent.items() if key not in dropped}, "samples": result}
