"""The command ``plan``: what a training run will need in memory, before anything is loaded for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data.dataset import LatentDataset
from ..errors import first_line
from ..files import DTYPES, load_tensors
from ..methods.components import ENCODER, Components
from ..methods.config import MethodConfig
from ..models.backends.diffusers import DiffusersBackend
from ..models.denoiser import Cond, Denoiser
from ..models.items import ITEM_TENSORS
from ..models.pipelines import MiniSource, PipelineSource, open_source
from ..models.teachers import Teacher, teachers_backend
from ..models.vision import transformers_vision
from ..perceptual import ELatentLPIPS, load_metric
from ..training.cards import AVERAGE, Load, load_of_step, on_cards, table
from ..training.config import Config, load_config
from ..training.fits import advice, verdict, ways
from ..training.ledger import without_data
from ..training.plan import GIB, Plan, Shapes, plan_step, spell
from ..training.plan_optimizers import STATE_BYTES
from ..training.run import RunConfig
from ..training.student import rank_of_file

SHARED_OUT = ("batch_size", "tokens_per_batch")  # of what several processes have a share each
Make = Callable[[FakeTensorMode], Components]
TOKENS = {"sd3": 77 + 256, "flux": 512}  # of text, where no dataset says it; SD 1.5 and SDXL have 77


def run_plan(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    if args.cards:
        print(cards_of(config, args.cards, LatentDataset(args.data) if args.data else None))
        return
    plan = plan_of(config, LatentDataset(args.data) if args.data else None, card=not args.cpu)
    print(plan.said())
    found = ways(plan, config.train, config.model.lora_rank, config.model.gradient_checkpointing)
    if args.free is None:
        print(f"it would need less with {advice(plan, found)}")
        return
    said = verdict(plan, found, int(args.free * GIB))
    print(said or f"it fits into {args.free:g} GiB")


def check_memory(config: Config, dataset: LatentDataset) -> None:
    """Raises ValueError, before anything is loaded, for a run that the GPU has no memory for, with what to change."""
    if not torch.cuda.is_available():
        return
    free, processes = torch.cuda.mem_get_info()[0], int(os.environ.get("WORLD_SIZE", "1"))
    config = with_share(config, processes)
    try:
        if config.train.shard:
            needed = on_cards(load_of(config, dataset), processes, True, **bytes_of_weights(config)).needed
            if needed > free:
                raise ValueError(
                    f"this run needs about {spell(needed)} on each of {processes} cards and {spell(free)} are free: "
                    "take more cards, a smaller batch_size with accumulation, or gradient_checkpointing. What it "
                    "needs: the command plan with --cards, docs/scaling.md. --no-preflight tries it anyway"
                )
            return
        plan = plan_of(config, dataset)
    except ValueError:
        raise
    except Exception as error:  # a network that cannot be planned may still be trained
        print(f"note: the memory of this run could not be planned ({first_line(error)})")
        return
    found = ways(plan, config.train, config.model.lora_rank, config.model.gradient_checkpointing)
    if said := verdict(plan, found, free):
        raise ValueError(f"{said}. --no-preflight tries it anyway")


def with_share(config: Config, processes: int) -> Config:
    """The run as one of several processes has it: with its share of the batch."""
    shares = {name: max(1, n // processes) for name in SHARED_OUT if (n := getattr(config.train, name))}
    return replace(config, train=replace(config.train, **shares))


def cards_of(config: Config, counts: list[int], dataset: LatentDataset | None = None) -> str:
    """What several cards would do to the memory and the time of a step, as a table."""
    train = config.train
    each = bytes_of_weights(config)
    return table(load_of(config, dataset), counts, train.shard, train.batch_size, **each)


def bytes_of_weights(config: Config) -> dict[str, float]:
    """The optimizer's state and the average, for each weight that is trained."""
    state = STATE_BYTES.get(config.train.optimizer, 8.0)
    return {"moments": state, "average": 0 if config.train.ema_in_ram else AVERAGE}


def load_of(config: Config, dataset: LatentDataset | None = None) -> Load:
    """What a step of the run does on one card."""
    run, make, shapes, distance = ingredients(config, dataset)
    return load_of_step(run, make, shapes, distance)


def plan_of(config: Config, dataset: LatentDataset | None = None, card: bool = True) -> Plan:
    """The plan of the run that a TOML file describes, on one card. dataset: None for sizes from the file."""
    run, make, shapes, distance = ingredients(config, dataset)
    return plan_step(replace(run, train=replace(run.train, shard=False)), make, shapes, card, distance)


def ingredients(config: Config, dataset: LatentDataset | None) -> tuple[RunConfig, Make, Any, Callable]:
    """What a plan is made of: the run, its components without data, the sizes of its batches, its distance."""
    source = open_source(config.model, config.cache.embedded_guidance, weights=False)
    method, model = config.method_config, config.model
    run = config.run({"base": "", "dataset": ""})
    shapes = dataset or shapes_of(config, source)

    def make(mode: FakeTensorMode) -> Components:
        network = without_data(source.backend.network, mode, DTYPES[model.dtype])
        own = source.backend
        backend = DiffusersBackend(network, own.process, model.gradient_checkpointing, own.items)
        components = with_eyes(config, source, backend, mode) if "vision" in method.sections else Components(backend)
        return replace(components, teacher=teacher_without_data(config, backend, mode))

    def distance(mode: FakeTensorMode) -> ELatentLPIPS | None:
        if not model.perceptual:
            return None
        metric = load_metric(None if model.perceptual == "mini" else model.perceptual)
        return cast(ELatentLPIPS, without_data(metric, mode))

    return run, make, shapes, distance


def teacher_without_data(config: Config, backend: DiffusersBackend, mode: FakeTensorMode) -> Teacher | None:
    """The teacher of [teacher], its network without data and its LoRA without values."""
    wanted, model = config.teacher, config.model
    if not wanted.other:
        return None
    if wanted.path:
        opened = teachers_backend(wanted.path, model, weights=False)
        network = without_data(opened.network, mode, DTYPES[model.dtype])
        backend = DiffusersBackend(network, opened.process, model.gradient_checkpointing, opened.items)
    lora = None
    if wanted.lora:
        layers, rank = list(backend.lora_parts(load_tensors(wanted.lora)[0])[0]), rank_of_file(wanted.lora)
        with mode:
            lora = backend.new_lora(rank, layers).requires_grad_(False)
    return Teacher(Denoiser(backend, lora, name=wanted.called()), "")


def shapes_of(config: Config, source: MiniSource | PipelineSource) -> Shapes:
    """The largest batch that the dataset of the same file will give."""
    backend = source.backend
    limits = backend.limits()
    tokens = TOKENS.get(backend.architecture.name, 77)
    if isinstance(source, MiniSource):
        cond = source.encode(source.default_prompts()[:1])[0]
    else:
        told = torch.ones(1) if backend.takes_guidance else None
        pooled = torch.zeros(1, limits.pooled) if limits.pooled else None
        cond = Cond(torch.zeros(1, tokens, limits.context or 1), pooled, told)
    height, width = max(config.cache.sizes, key=lambda size: size[0] * size[1])
    latent = (source.channels, height, width)
    zeros = lambda name: torch.zeros(1, *ITEM_TENSORS[name].shape(latent, latent[1:]))  # noqa: E731
    cond, method = cond.with_items({name: zeros(name) for name in limits.items}), config.method_config
    beside = {name: zeros(name) for name in method.needs}
    return Shapes(latent, cond, stored(method, backend), config.cache.guidance, beside)


def stored(method: MethodConfig, backend: DiffusersBackend) -> tuple[float, ...]:
    """The levels at which its pairs must be stored."""
    return method.levels(backend.process) if method.weight("pairs") else ()


def with_eyes(
    config: Config, source: MiniSource | PipelineSource, backend: DiffusersBackend, mode: FakeTensorMode
) -> Components:
    """The components of ADD, its decoder and vision network without data."""
    if isinstance(source, PipelineSource) and not config.vision.decoder:
        source.vae = without_data(source.vae, mode, source.dtype)
    components = Components(backend, source.decode_with_gradient, source.encoder)
    if config.vision.network in (ENCODER, "efficientnet"):
        return components
    vision = transformers_vision(config.vision.network, config.vision.blocks, config.vision.size or 224, weights=False)
    vision.network = without_data(vision.network, mode)
    return replace(components, vision=vision)
