"""The command ``plan``: what a training run will need in memory, before anything is loaded for it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data.dataset import LatentDataset
from ..errors import first_line
from ..files import DTYPES
from ..methods.components import ENCODER, Components
from ..methods.config import MethodConfig
from ..models.backends.diffusers import DiffusersBackend
from ..models.denoiser import Cond
from ..models.pipelines import MiniSource, PipelineSource, open_source
from ..models.vision import transformers_vision
from ..perceptual import ELatentLPIPS, load_metric
from ..training.config import Config, load_config
from ..training.fits import advice, verdict, ways
from ..training.ledger import without_data
from ..training.plan import GIB, Plan, Shapes, plan_step
from ..training.run import RunConfig, StudentConfig

TOKENS = {"sd3": 77 + 256, "flux": 512}  # of text, where no dataset says it; SD 1.5 and SDXL have 77


def run_plan(args: argparse.Namespace) -> None:
    config = load_config(args.config)
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
    try:
        plan = plan_of(config, dataset)
    except Exception as error:  # a network that cannot be planned may still be trained
        print(f"note: the memory of this run could not be planned ({first_line(error)})")
        return
    found = ways(plan, config.train, config.model.lora_rank, config.model.gradient_checkpointing)
    if said := verdict(plan, found, torch.cuda.mem_get_info()[0]):
        raise ValueError(f"{said}. --no-preflight tries it anyway")


def plan_of(config: Config, dataset: LatentDataset | None = None, card: bool = True) -> Plan:
    """The plan of the run that a TOML file describes. dataset: None for sizes from the file."""
    source = open_source(config.model, config.cache.embedded_guidance, weights=False)
    method, model = config.method_config, config.model
    student = StudentConfig(model.lora_rank, model.lora_targets, model.sampler, lora=config.lora)
    identities = {"base": "", "dataset": ""}
    run = RunConfig(method, config.train, student, identities, config.discriminator, config.vision, model.taps)
    shapes = dataset or shapes_of(config, source)

    def make(mode: FakeTensorMode) -> Components:
        network = without_data(source.backend.network, mode, DTYPES[model.dtype])
        backend = DiffusersBackend(network, source.backend.process, model.gradient_checkpointing)
        if "vision" not in method.sections:
            return Components(backend)
        return with_eyes(config, source, backend, mode)

    def distance(mode: FakeTensorMode) -> ELatentLPIPS | None:
        if not model.perceptual:
            return None
        metric = load_metric(None if model.perceptual == "mini" else model.perceptual)
        return cast(ELatentLPIPS, without_data(metric, mode))

    return plan_step(run, make, shapes, card, distance)


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
    return Shapes((source.channels, height, width), cond, stored(config.method_config, backend), config.cache.guidance)


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
