"""A MODEL sampled by the host itself into latents in model space, so that all its patches take effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.conds
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...distill_core.data.cache import group_in_turn, groups_by_length
from ...distill_core.diffusion.noise import ItemNoise
from ...distill_core.diffusion.schedules import same_level
from ...distill_core.models.denoiser import Cond, cat_conds
from .items import IMAGE_VALUE, MASK_VALUE, REFERENCE_VALUE

OF_A_ROW = ("pooled_output", IMAGE_VALUE, MASK_VALUE)  # values of a CONDITIONING that each row has its own of


def one_entry(conditioning: list, what: str = "positive") -> list:
    """The only entry [tokens, values] of a CONDITIONING of one prompt. Raises ValueError for combined or empty ones."""
    parts = sum(len(tokens) for tokens, _ in conditioning)
    if parts != 1:
        raise ValueError(
            f"a {what} conditioning has {parts} parts: combined, masked or timed conditionings cannot be "
            "distilled; give one plain conditioning per prompt"
        )
    return conditioning[0]


def join_conditionings(conditionings: Sequence[list]) -> list:
    """CONDITIONINGs of the same shape as one, with one row per row of a batch.

    Raises ValueError when they differ in anything but tokens, pooled output and what is told of a picture.
    """
    entries = [one_entry(conditioning) for conditioning in conditionings]
    values = dict(entries[0][1])
    for key in values.keys() | {key for _, other in entries for key in other}:
        theirs = [other.get(key) for _, other in entries]
        if key in OF_A_ROW and all(value is not None for value in theirs):
            values[key] = torch.cat(theirs)
        elif key == REFERENCE_VALUE and len({_shapes(value) for value in theirs}) == 1:
            values[key] = [torch.cat(pictures) for pictures in zip(*theirs, strict=True)]
        elif not all(comfy.conds.is_equal(value, theirs[0]) for value in theirs):
            raise ValueError(f"the conditionings differ in {key!r}: give all of them the same")
    return [[torch.cat([tokens for tokens, _ in entries]), values]]


def _shapes(pictures: Sequence[Tensor] | None) -> tuple:
    return tuple(picture.shape for picture in pictures or ())


class HostTeacher:
    """The source of items for `dataset.write_shards`: called with (items, shard), it samples their latents.

    positives: one CONDITIONING per prompt.
    conds: the same as rows for training.
    sampler: for the noise of a batch's items and the latents [B, ...] it starts as, the SAMPLER.
    sizes: latent sizes [H, W], used in turn, one per shard.
    state_sigmas: levels of ``sigmas`` at which the state of the path is stored.
    purpose: names the stream of noise (`ItemNoise`).
    progress: called after every sampling step with (fraction of the batch that is done, preview or None).
    """

    def __init__(
        self,
        model,
        positives: Sequence[list],
        conds: Sequence[Cond],
        *,
        negative: list | None,
        cfg: float,
        sampler: Callable[[ItemNoise, Tensor], comfy.samplers.KSAMPLER],
        sigmas: Tensor,
        sizes: Sequence[tuple[int, int]],
        seed: int,
        state_sigmas: Sequence[float] = (),
        purpose: str = "",
        progress=None,
    ) -> None:
        if cfg != 1 and negative is None:
            raise ValueError(f"cfg {cfg:g} needs a negative conditioning: connect one, or set cfg to 1")
        self.model, self.positives, self.conds, self.sampler, self.sigmas = model, positives, conds, sampler, sigmas
        self.sizes, self.seed, self.state_sigmas, self.progress = sizes, seed, state_sigmas, progress
        self.purpose = purpose
        self.guider = comfy.samplers.CFGGuider(model)
        self.negative, self.cfg = negative, cfg
        self.layout = model.get_model_object("latent_format")
        self.groups = groups_by_length(conds)
        self.previewer = latent_preview.get_previewer(model.load_device, self.layout)

    def __call__(self, items: range, shard: int) -> dict[str, Tensor]:
        group = group_in_turn(shard // len(self.sizes), self.groups)
        prompts = [group[i % len(group)] for i in items]
        latents, states = self._sample(prompts, self.sizes[shard % len(self.sizes)], items)
        rows = cat_conds([self.conds[i] for i in prompts])
        return {"latents": latents, **rows.tensors(), **({"states": states} if self.state_sigmas else {})}

    def _sample(self, prompts: Sequence[int], size: tuple[int, int], items: range) -> tuple[Tensor, Tensor | None]:
        frames = (1,) if self.layout.latent_dimensions == 3 else ()
        random = ItemNoise(self.seed, items, self.purpose)
        noise = random.normal(self.layout.latent_channels, *frames, *size)
        positive = join_conditionings([self.positives[i] for i in prompts])
        conds = {"positive": positive} if self.cfg == 1 else {"positive": positive, "negative": self.negative}
        self.guider.inner_set_conds(conds)
        self.guider.set_cfg(self.cfg)
        states = []

        def after_step(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            sigma = self.sigmas[step].item()
            if any(same_level(sigma, wanted) for wanted in self.state_sigmas):
                states.append(self._image(x))
            if self.progress is not None:
                preview = self.previewer and self.previewer.decode_latent_to_preview_image("JPEG", denoised)
                self.progress((step + 1) / total, preview)

        sampled = self.guider.sample(
            noise,
            torch.zeros_like(noise),
            self.sampler(random, noise.to(self.model.load_device)),
            self.sigmas,
            callback=after_step,
            disable_pbar=True,
            seed=self.seed,
        )
        latents = self._image(self.model.model.process_latent_in(sampled))
        return latents, torch.stack(states, dim=1) if self.state_sigmas else None

    def _image(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in float32 on the CPU; the one frame of a video model's latent is the image."""
        return (x[:, :, 0] if x.ndim == 5 else x).detach().float().cpu().clone()
