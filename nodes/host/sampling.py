"""Our samplers run by the host's guider, with its model loading, hooks, masks, previews and progress bar."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
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
    CPU the network runs for one image at a time, so that not even its rounding depends on the batch.
    """
    function = SAMPLERS[name]

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None) -> Tensor:
        extra_args, noise = extra_args or {}, noise_sampler
        if noise is None:
            items = ItemNoise((extra_args.get("seed") or 0) + 1, range(first_item, first_item + len(x)))
            noise = lambda sigma, sigma_next: items.normal_like(x)  # noqa: E731
        if x.device.type == "cpu":
            model_options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
            kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
            wrap = comfy.patcher_extension.add_wrapper_with_key
            wrap(kind, ImageByImage.KEY, ImageByImage(), model_options, is_model_options=True)
            extra_args = {**extra_args, "model_options": model_options}
        return function(HostDenoiser(model), x, sigmas, extra_args, callback, disable, noise_sampler=noise, **options)

    return comfy.samplers.KSAMPLER(sample)


class ImageByImage:
    """A wrapper of the network's call that gives it one image at a time: all rows of the image, its prompts', together.

    Matrix products of different heights round differently, so an image would depend on the rest of its batch. Patches
    that compare the rows of an image (normalized attention guidance) still find them side by side.
    A patch may need the whole batch (one embedding a row, frames as rows). So where the network is patched, the first
    call is computed in both ways, and if they differ by more than rounding the batch stays whole for the rest of the
    run. Under wrappers of others, which may keep something from call to call, it stays whole from the start.
    """

    KEY = "turbo_distill"
    ROUNDING = 50.0  # relative difference, in units of the last bit of the network's numbers

    def __init__(self) -> None:
        self.whole: bool | None = None  # whether the batch must stay together; None until the first call

    def __call__(self, network, x, t, c_concat, c_crossattn, control, transformer_options, **conditions) -> Tensor:
        images = len(x) // len(transformer_options["cond_or_uncond"])
        named = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **conditions}
        if images > 1 and self.whole is None:
            self.whole = self._must_stay_whole(network, x, t, transformer_options, named, images)
        if images == 1 or self.whole:
            return network(x, t, transformer_options=transformer_options, **named)
        return self._apart(network, x, t, transformer_options, named, images)

    def _apart(self, network, x: Tensor, t: Tensor, options: dict, named: dict, images: int) -> Tensor:
        """Rows lie prompt after prompt: prompt 0 of image 0, prompt 0 of image 1, ..., prompt 1 of image 0, ..."""
        rows, parts = len(x), []
        xs, ts = _rows_of(x, images, rows), _rows_of(t, images, rows)
        sigmas = _rows_of(options["sigmas"], images, images)  # one for each image, not for each row
        cut = {name: _rows_of(value, images, rows) for name, value in named.items()}
        for image in range(images):
            # ad_params: where IP-Adapter and AnimateDiff packs look for the part of the batch that is computed.
            part = {"ad_params": {"sub_idxs": [image], "full_length": images}, **options, "sigmas": sigmas[image]}
            own = {name: values[image] for name, values in cut.items()}
            parts.append(network(xs[image], ts[image], transformer_options=part, **own))
        return torch.stack(parts, 1).flatten(0, 1)

    def _must_stay_whole(self, network, x: Tensor, t: Tensor, options: dict, named: dict, images: int) -> bool:
        wrappers = options.get("wrappers", {}).values()
        if any(by_key.keys() - {self.KEY} for by_key in wrappers) or options.get("callbacks"):
            return True
        patched = any(options.get(kind) for kind in ("patches", "patches_replace", "optimized_attention_override"))
        if not patched and "num_video_frames" not in named:
            return False
        together = network(x, t, transformer_options=options, **named)
        try:
            apart = self._apart(network, x, t, options, named, images)
        except RuntimeError:  # a patch that holds tensors of the whole batch
            return True
        rounding = self.ROUNDING * torch.finfo(network.class_obj.get_dtype_inference()).eps
        return bool((together - apart).abs().max() > rounding * together.abs().max())


def _rows_of(value, images: int, rows: int) -> Sequence:
    """``value`` for each image: tensors with ``rows`` rows are cut, also in lists and dictionaries."""
    if isinstance(value, Tensor):
        if not value.ndim or len(value) != rows:
            return [value] * images
        if rows == images:
            return value.split(1)
        return [part.contiguous() for part in value.unflatten(0, (rows // images, images)).unbind(1)]
    if isinstance(value, (list, tuple)):
        parts = [_rows_of(part, images, rows) for part in value]
        return [type(value)(part[image] for part in parts) for image in range(images)]
    if isinstance(value, dict):
        parts = {name: _rows_of(part, images, rows) for name, part in value.items()}
        return [{name: part[image] for name, part in parts.items()} for image in range(images)]
    return [value] * images


def batch_items(latent: dict, batch: int) -> Sequence[int]:
    """The index of every row in its original batch (LatentFromBatch keeps it), or else in this one."""
    items = latent.get("batch_index")
    return items if items is not None and len(items) == batch else range(batch)


def is_video(samples: Tensor) -> bool:
    """Whether latents [B, C, T, H, W] have more than one frame."""
    return samples.ndim == 5 and samples.shape[2] > 1


def is_empty_mask(latent: dict) -> bool:
    """Whether a LATENT has a noise mask that leaves every pixel as it is."""
    mask = latent.get("noise_mask")
    return mask is not None and not bool(mask.any())


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
        kind = {3: "sound", 4: "an image", 5: "a video"}.get(samples.ndim, "something else")
        raise ValueError(
            f"the latent is {kind} (shape {tuple(samples.shape)}), which this model does not take; use the empty "
            "latent node of its family"
        )
    return samples


def recipe_sampler(recipe: Recipe, noise: ItemNoise, initial: Tensor) -> comfy.samplers.KSAMPLER:
    """A recipe's sampler for a batch that starts as ``initial``; what it adds are the rows' next draws."""
    return host_sampler(recipe.sampler, recipe.sampler_options, lambda sigma, sigma_next: noise.normal_like(initial))


def sample_latent(
    model, positive, negative, *, latent: dict, recipe: Recipe, seed: int, previews: bool = True
) -> tuple[dict, dict]:
    """Run a recipe on a LATENT: the sampled LATENT and the last denoised one.

    All noise of row i comes from (seed, its batch index), so that it can be remade alone. Where the mask is 0 the
    latent comes back as it was, to the last bit. previews: whether the node shows them, and its bar.
    Raises ValueError for a cfg other than 1 without a negative.
    """
    samples = fitting_latent(model, latent)
    noise = ItemNoise(seed, batch_items(latent, len(samples)))
    initial = noise.normal(*samples.shape[1:])
    sampler = recipe_sampler(recipe, noise, initial.to(model.load_device))
    guider = _guider(model, positive, negative, recipe.cfg)
    mask, last = latent.get("noise_mask"), {}
    keep_last = lambda step, x0, x, steps: last.update(x0=x0)  # noqa: E731
    callback = latent_preview.prepare_callback(model, len(recipe.sigmas) - 1, last) if previews else keep_last
    sampled = guider.sample(
        initial,
        samples,
        sampler,
        recipe.sigmas,
        denoise_mask=mask,
        callback=callback,
        disable_pbar=not (previews and comfy.utils.PROGRESS_BAR_ENABLED),
        seed=seed,
    )
    denoised = model.model.process_latent_out(last["x0"].to(torch.float32))
    return tuple(_wrap(latent, result, samples, mask) for result in (sampled, denoised))


def _guider(model, positive, negative, cfg: float) -> comfy.samplers.CFGGuider:
    if cfg != 1 and negative is None:
        raise ValueError(f"cfg {cfg:g} needs a negative conditioning: connect one, or set cfg to 1")
    guider = comfy.samplers.CFGGuider(model)
    # Also at cfg 1, where the host leaves it out unless a patch asks for it (normalized attention guidance does).
    guider.inner_set_conds({"positive": positive, **({} if negative is None else {"negative": negative})})
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
