"""The command ``retention``: what a turbo keeps of itself with a LoRA, and how near it comes to own pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import LatentDataset
from ..diffusion.schedules import explicit_sigmas
from ..evaluation.concept_gain import OwnPictures, concept_gain
from ..evaluation.retention import FINER, Asked, retention, sample_answers, sample_step_gaps
from ..evaluation.retention_report import MOST_COLUMNS, in_text, picture
from ..files import load_tensors, save_json
from ..lora_files import NAMESPACE, read_lora
from ..models.denoiser import Denoiser, Guided
from ..models.pipelines import MiniSource, PipelineSource, open_source, read_prompts
from ..presets.recipe import Recipe
from ..training.config import Config, load_config
from ..training.student import rank_of_file, start_from
from .evaluate import device_of, was_trained_on
from .sample import open_student
from .turbo import find_turbo


def run_retention(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    state, description = read_any(args.lora)
    own = open_own(args, description)
    source = open_source(config.model, description.get("embedded_guidance", config.cache.embedded_guidance))
    prompts = read_prompts(str(args.prompts or config.prompts.prompts), source)
    conds, uncond = source.encode(prompts, config.prompts.negative)
    shape = source.channels, *config.cache.sizes[0]
    turbo = turbo_of(config, source, shape, description)
    sampler = turbo.sampler, turbo.sampler_options
    asked = Asked([conds[[row]] for row in range(len(prompts))], turbo.sigmas, shape, args.noises, *sampler, args.seed)
    device = device_of(source)

    def asks(denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
        """Its answers, its step gaps, its samples of the own pictures' prompts."""
        model = Guided(denoiser, uncond, turbo.cfg)
        answers, gaps = sample_answers(model, asked, bar.update), sample_step_gaps(model, asked, bar.update)
        return answers, gaps, own.samples(model, asked, device) if own else torch.empty(0)

    with tqdm(total=2 * (2 + FINER) * asked.forwards, desc="retention") as bar:
        before = asks(Denoiser(source.backend))  # first: differences of all weights go into the network
        after = asks(open_any(source, args.lora, state, description))
    if description.get("weights") == "differences":
        source.backend.add_differences({name: -value for name, value in state.items()})
    figures = retention(before[0], after[0], len(prompts), (before[1], after[1]))
    if own:
        seen = [own.features(Denoiser(source.backend), x, device) for x in (own.latents, before[2], after[2])]
        figures |= concept_gain(seen[0], seen[1], seen[2])
    args.out.mkdir(parents=True, exist_ok=True)
    save_json(
        args.out / "retention.json",
        {
            "figures": {name: figure.plain() for name, figure in figures.items()},
            "prompts": prompts,
            "noises": args.noises,
            "seed": args.seed,
            "sigmas": turbo.sigmas.tolist(),
            "sampler": turbo.sampler,
            "cfg": turbo.cfg,
            "own_pictures": len(own.conds) if own else 0,
            "warnings": description.get("warnings", []),
        },
    )
    drawn = [images_of(source, x[0][:MOST_COLUMNS], device) for x in (before, after)]
    picture(figures, *drawn).save(args.out / "retention.png")
    print(f"{len(prompts)} prompts, {args.noises} noises each; before and after {args.lora.name}")
    print(in_text(figures))


def read_any(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a LoRA file, and what it says of itself: nothing, if it is not of this project."""
    state, metadata = load_tensors(path)
    return read_lora(path) if NAMESPACE + "sigmas" in metadata else (state, {})


def open_any(source: MiniSource | PipelineSource, path: Path, state: dict[str, Tensor], description: dict) -> Denoiser:
    """The model with a LoRA of this project, or of others. Raises ValueError for one that does not fit."""
    if description:
        return open_student(source, state, description)
    try:
        lora = source.backend.new_lora(rank_of_file(path))
        start_from(source.backend, lora, path)
    except ValueError as error:
        raise ValueError(str(error).replace("start_from:", "--lora:")) from error
    return Denoiser(source.backend, lora)


def turbo_of(config: Config, source: MiniSource | PipelineSource, shape: Sequence[int], description: dict) -> Recipe:
    """How the turbo is sampled; as the LoRA says where nothing tells of the model. Raises ValueError where neither."""
    try:
        return find_turbo(config, source, shape)
    except ValueError:
        if not description:
            raise
    sigmas, sampler = explicit_sigmas(description["sigmas"]), description.get("sampler", "renoise")
    return Recipe(sigmas, sampler, description.get("sampler_options", {}), description.get("cfg", 1.0), "")


def open_own(args: argparse.Namespace, description: dict) -> OwnPictures | None:
    """The pictures that ``--data`` names. Raises ValueError for those that the LoRA was trained on."""
    if args.data is None:
        return None
    dataset = LatentDataset(args.data)
    if was_trained_on(dataset, description):
        raise ValueError(
            f"--data {args.data} is what this LoRA was trained on, and it is near to what it has seen: name pictures "
            "that it has not seen, or leave --data out"
        )
    return OwnPictures.of(dataset)


def images_of(source: MiniSource | PipelineSource, latents: Tensor, device: torch.device) -> Tensor:
    """Images [N, H, W, 3] in [0, 1] of latents."""
    images = torch.cat([source.decode(x.to(device)).float().cpu() for x in latents.split(1)])
    return (images.movedim(1, -1) + 1) / 2
