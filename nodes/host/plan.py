"""Will it fit, for a run in the host: the plan of its step, and whether the device has the memory (`training.plan`).

A plan never stops a run by failing: a network that cannot be planned may still be trained.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...distill_core.data.dataset import LatentDataset
from ...distill_core.errors import first_line
from ...distill_core.methods.components import Components
from ...distill_core.models.denoiser import Denoiser
from ...distill_core.models.lora import is_linear
from ...distill_core.models.lora_stack import rank_of_parts
from ...distill_core.models.teachers import Teacher
from ...distill_core.training.fits import verdict, ways
from ...distill_core.training.ledger import without_data
from ...distill_core.training.plan import Plan, plan_step
from ...distill_core.training.run import RunConfig
from .architectures import architecture_of
from .backend import ComfyBackend, in_training
from .decoder import Decoder
from .model import training_process_of
from .other_teacher import further_loras
from .quantized import is_quantized

if TYPE_CHECKING:
    from .training import Request


GGUF_ATTRIBUTES = ("tensor_type", "tensor_shape")  # of ComfyUI-GGUF's tensors
IN_FP8 = "the model in fp8 (weight_dtype of Load Diffusion Model)"


def check_memory(request: Request, config: RunConfig, dataset: LatentDataset) -> None:
    """Raises ValueError, before anything is copied, for a run that the device has no memory for. Not on a CPU."""
    if request.model.load_device.type == "cpu" or not request.train.preflight:
        return
    said = memory_verdict(request, config, dataset)
    if said:
        raise ValueError(f"{said}. preflight off in Training Settings tries it anyway")


def memory_verdict(request: Request, config: RunConfig, dataset: LatentDataset) -> str | None:
    """What is to be said of a run that needs more than is free; None where it fits, or cannot be planned."""
    try:
        plan = plan_of(request, config, dataset)
    except Exception as error:
        logging.info("the memory of this run could not be planned: %s", first_line(error))
        return None
    logging.info("%s", plan.said())
    halves = request.model.model.get_dtype() in (torch.float16, torch.bfloat16)
    found = ways(plan, request.train, request.student.rank, request.checkpointing, IN_FP8 if halves else "")
    return verdict(plan, found, free_memory(request.model.load_device))


def free_memory(device: torch.device) -> int:
    """Bytes that a run finds, once the host has put all other models out of its way."""
    loaded = comfy.model_management.current_loaded_models
    held = sum(entry.model_loaded_memory() for entry in loaded if entry.device == device)
    return int(comfy.model_management.get_free_memory(device)) + held


def plan_of(request: Request, config: RunConfig, dataset: LatentDataset) -> Plan:
    """The plan of the run, as on MODEL's device: of its largest step, where datasets are mixed that differ in kind."""
    kinds = {bool(member.state_sigmas): member for member in getattr(dataset, "members", [])} or {False: dataset}
    return max((plan_on(request, config, member) for member in kinds.values()), key=lambda plan: plan.peak)


def plan_on(request: Request, config: RunConfig, dataset: LatentDataset) -> Plan:
    """The plan of a step on batches of one dataset."""

    def make(mode: FakeTensorMode) -> Components:
        backend = unloaded_backend(request.model, request.checkpointing, mode)
        components = request.parts.components(backend, request.train, request.checkpointing)
        if isinstance(components.decode, Decoder):
            components.decode.network = without_data(components.decode.network, mode)
        if components.vision is not None:
            components.vision.network = without_data(components.vision.network, mode)
        return replace(components, teacher=unloaded_teacher(request, backend, mode))

    def distance(mode: FakeTensorMode):
        found = request.parts.perceptual
        return without_data(found, mode) if isinstance(found, nn.Module) else found

    with torch.inference_mode(False), in_training():
        card = request.model.load_device.type != "cpu"
        return plan_step(config, make, dataset, card, distance)


def unloaded_backend(model, checkpointing: bool, mode: FakeTensorMode) -> ComfyBackend:
    """MODEL as `backend.training_backend` gives it, around a network whose weights have no data."""
    network = without_data(model.model.diffusion_model, mode, handles=True)
    for name, module in list(model.model.diffusion_model.named_modules()):
        if is_linear(module) and is_quantized(module.weight):
            set_module(network, name, Dequantizing(module, mode))
    twin = copy.copy(model.model)
    twin._modules = {**model.model._modules, "diffusion_model": network}
    twin.current_patcher = None
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(twin, cpu, cpu)
    patcher.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
    patcher.object_patches = dict(model.object_patches)
    architecture, process = architecture_of(network), training_process_of(model)
    backend = ComfyBackend(patcher, architecture, process, checkpointing)
    patcher.patch_model(load_weights=False)
    backend.network.requires_grad_(False).eval()
    return backend


def unloaded_teacher(request: Request, backend: ComfyBackend, mode: FakeTensorMode) -> Teacher | None:
    """The teacher as `other_teacher.open_teacher` gives it, without data; None where it is the model itself."""
    if (other := request.other_teacher) is None:
        return None
    lora, parts = None, further_loras(request.model, other)
    if parts is None:
        backend = unloaded_backend(other, request.checkpointing, mode)
    else:
        with mode:
            lora = backend.new_lora(rank_of_parts(parts), list(parts)).requires_grad_(False)
    return Teacher(Denoiser(backend, lora), "")


class Dequantizing(nn.Module):
    """In place of a quantized linear layer: as many stored bytes, and a weight in full for the time of its use.

    The host's formats are made full by one kernel. GGUF's are by many operations of the layer's own, which are done
    here too: what they need meanwhile is more than the weight.
    """

    def __init__(self, layer: nn.Module, mode: FakeTensorMode) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        given = layer.weight.data
        stored = getattr(given, "_qdata", given).as_subclass(Tensor)
        self.own: Callable | None = getattr(layer, "get_weight", None)
        self.kind = {name: vars(given)[name] for name in GGUF_ATTRIBUTES if name in vars(given)}
        with mode:
            weight = torch.empty(stored.shape, dtype=stored.dtype)
            if not self.kind:
                weight = torch.empty(stored.numel() * stored.element_size(), dtype=torch.uint8)
            self.weight = nn.Parameter(weight, requires_grad=False)
            bias = torch.empty(self.out_features) if layer.bias is not None else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def get_weight(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if self.own is None or not self.kind:
            return stored.new_empty(self.out_features, self.in_features, dtype=dtype)
        raw = stored.detach()
        vars(raw).update(self.kind)
        return self.own(raw, dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.get_weight(self.weight, x.dtype), bias)


def set_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of that name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
