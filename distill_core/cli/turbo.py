"""A turbo model on the command line: how it is used, and its own samples, for what is trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.dataset import LatentDataset
from ..data.kept import ASSORTED, cache_kept, kept_config
from ..data.manifest import OtherDataset
from ..data.mix import new_mix, open_data
from ..diffusion.schedules import explicit_sigmas
from ..digests import fingerprint
from ..methods.tune import TuneConfig
from ..models.denoiser import Denoiser, Guided
from ..models.families import FAMILIES
from ..models.pipelines import MiniSource, PipelineSource, read_prompts
from ..presets.facts import ModelFacts, TurboLora
from ..presets.recipe import Recipe, make_recipe
from ..training.config import Config
from .cache import show


def find_turbo(config: Config, source: MiniSource | PipelineSource, shape: Sequence[int]) -> Recipe:
    """How the turbo is used, which is said in a line: levels, sampler and guidance.

    Those of [model] preset: by default what the file of one of [model] loras says, or how its family is used. Given
    student_sigmas (of [tune], or of another method that tunes a turbo) take their place, with [model] sampler and no
    guidance.  shape: of latents [C, H, W].
    Raises ValueError where nothing tells.
    """
    section = config.method if config.method_config.tunes else TuneConfig.name
    model, given = config.model, config.methods[section].student_sigmas
    if given:
        text = f"levels: [{section}] student_sigmas; sampler: [model] sampler; no guidance"
        found = Recipe(explicit_sigmas(given), model.sampler, {}, 1.0, text)
    else:
        height, width = (side * source.scale for side in shape[1:])
        try:
            steps = model.preset_steps or None
            found = make_recipe(facts_of(source), model.preset, steps, width=width, height=height)
        except ValueError as error:
            raise ValueError(
                f"how this turbo is used is not known ({error}). Name its LoRA in [model] loras, choose a [model] "
                f"preset, or give its levels in [{section}] student_sigmas and its [model] sampler"
            ) from error
    levels = ", ".join(f"{level:.4g}" for level in found.sigmas[:-1].tolist())
    lines = found.explanation.splitlines()
    last = next((number for number, line in enumerate(lines) if line.startswith("Source")), 0)
    named = lines[last] if lines[last].startswith("Source:") else lines[0]  # a file, or a preset's title
    print(f"the turbo is used at {levels} with {found.sampler}, cfg {found.cfg:g} ({named})")
    for doubt in filter(None, lines[last + 1 :]):
        print(f"note: {doubt}")
    return found


def facts_of(source: MiniSource | PipelineSource) -> ModelFacts:
    """What recipes ask of a model."""
    backend, described = source.backend, source.backend.description()
    return ModelFacts(
        backend.family_name if backend.family_name in FAMILIES else None,
        backend.process,
        getattr(backend.process, "sigmas", None),
        loras=tuple(TurboLora(lora.name, lora.metadata, len(lora.parts)) for lora in backend.below),
        strengths=(1.0,) * len(backend.below),
        guidance_embedded=backend.takes_guidance,
        base=described["base"],
        layout=described["base_layout"],
        below=described.get("below", ()),
    )


def tuned(config: Config, turbo: Recipe) -> Config:
    """The configuration with the turbo's levels as those of the student."""
    method = replace(config.method_config, student_sigmas=tuple(turbo.sigmas[:-1].tolist()))
    return replace(config, methods={**config.methods, config.method: method})


def teachers_recipe(config: Config, source: MiniSource | PipelineSource) -> Recipe:
    """How the model itself is sampled, for a method that changes it and gives it no levels: as `sample` does it."""
    sigmas = explicit_sigmas(config.method_config.levels(source.backend.process))
    return Recipe(sigmas, "euler", {}, config.cache.guidance, "as the model itself")


def with_kept(
    config: Config,
    source: MiniSource | PipelineSource,
    turbo: Recipe,
    own: LatentDataset,
    folder: Path,
    accelerator: Any = None,
) -> LatentDataset:
    """Own latents mixed with samples of the turbo, which are made in ``folder`` where they are not there yet."""
    method = config.method_config
    if not (isinstance(method, TuneConfig) and method.keeps):
        return own
    if len(own.members) > 1:
        raise ValueError('method = "tune" makes what it keeps by itself: give one dataset as --data instead of a mix')
    if accelerator is None or accelerator.is_main_process:
        sizes = dict.fromkeys((height, width) for _, height, width in own.shapes)
        make_kept(config, source, turbo, list(sizes), folder)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    share = config.kept.share
    return open_data(new_mix({own.folder: 1 - share, folder: share}))


def make_kept(
    config: Config, source: MiniSource | PipelineSource, turbo: Recipe, sizes: Sequence[tuple[int, int]], folder: Path
) -> LatentDataset:
    """The turbo's own samples of [kept] prompts at latent sizes [H, W], made or gone on with, with a bar."""
    kept = config.kept
    default = "" if isinstance(source, MiniSource) else str(ASSORTED)
    prompts = read_prompts(kept.prompts or default, source, "[kept] prompts")
    conds, uncond = source.encode(prompts, config.prompts.negative)
    description: dict[str, Any] = {
        "base": fingerprint(source.backend.network),
        "prompts": hashlib.sha256("\n".join([*prompts, config.prompts.negative]).encode()).hexdigest(),
    }
    if uncond.guidance is not None:
        description["embedded_guidance"] = source.embedded_guidance
    levels = turbo.sigmas[:-1].tolist()
    cache = kept_config(
        levels, kept.count, (1, 1), guidance=turbo.cfg, seed=kept.seed, batch_size=min(kept.batch_size, kept.count)
    )
    of_a_size = -(-kept.count // len(sizes))  # a shard has one size, and they take the sizes in turn
    cache = replace(cache, sizes=tuple(sizes), shard_size=min(of_a_size, cache.shard_size))
    made = cache_kept(
        Guided(Denoiser(source.backend), uncond, turbo.cfg),
        conds,
        source.channels,
        cache,
        folder,
        sampler=turbo.sampler,
        sampler_options=turbo.sampler_options,
        description=description,
    )
    try:
        show(made, "samples of the turbo")
    except OtherDataset as error:
        words = {"prompts": "[kept] prompts", "base": "[model] path or loras", "config.seed": "[kept] seed"}
        raise ValueError(error.said(words, "choose another --out, or delete it to make them anew")) from None
    return LatentDataset(folder)
