"""Copies of the host's networks for training: a frozen one with MODEL's patches, and one with trainable weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from ...distill_core.models.precision import check_in_full


def own_copy(model):
    """A patcher with MODEL's patches on weights of its own: loaded again, or copied if its loader cannot be asked.

    Raises ValueError when neither is possible.
    """
    if model.cached_patcher_init is not None:
        patcher = model.clone(disable_dynamic=True, force_deepcopy=True)
    elif model.is_dynamic():
        raise ValueError(
            "this MODEL cannot be copied for training: its loader does not tell how to load it again, and its weights "
            "are paged. Load it with Load Diffusion Model or Load Checkpoint, or start ComfyUI with "
            "--disable-dynamic-vram"
        )
    else:
        patcher = model.clone(model_override=_copied(model).get_clone_model_override())
    _without_fast_fp8(patcher.model)
    patcher.parent = None  # or else the host would consider MODEL loaded once this copy is gone
    return patcher


def _without_fast_fp8(network: torch.nn.Module) -> None:
    """Give layers that multiply in fp8 (fp8_e4m3fn_fast, --fast) the ordinary forward.

    They do so only where no gradient is asked: features of real and of fake latents would differ by 2 %, and a
    discriminator could tell them apart by that.
    """
    fast = getattr(comfy.ops, "fp8_ops", None)
    for module in network.modules() if fast else ():
        if type(module) is fast.Linear:
            module.__class__ = comfy.ops.manual_cast.Linear


def can_share(model) -> bool:
    """Whether a copy can be made of MODEL's own weights: they are in host memory, and stay as they are there."""
    return model.load_device.type == "cpu" and not model.is_dynamic() and not model.weight_inplace_update


def shared_copy(model):
    """A patcher with MODEL's patches on a network of its own, whose weights lie where MODEL's do (`can_share`).

    Nobody writes to them: a patch makes another weight. For weights that are to be mapped from a file, which then hold
    no memory twice (`lie_with`).
    """
    patcher = model.clone(model_override=_copied(model, share=True).get_clone_model_override())
    _without_fast_fp8(patcher.model)
    patcher.parent = None
    return patcher


def shared_weights(model, network: nn.Module) -> list[str]:
    """Names of MODEL's weights that lie where those of ``network``, a `shared_copy`'s, do."""
    own = dict(network.named_parameters())
    given = model.model.diffusion_model.named_parameters()
    plain = [(name, value) for name, value in given if type(value.data) is torch.Tensor]
    return [name for name, value in plain if own[name].data_ptr() == value.data_ptr()]


def lie_with(model, network: nn.Module, names: Sequence[str]) -> None:
    """Have these weights of MODEL lie where those of ``network`` do by now, if these are the same numbers still.

    MODEL computes as before; what held its weights until now is given back.
    """
    own, theirs = dict(network.named_parameters()), model.model.diffusion_model
    for name in names:
        place, _, leaf = name.rpartition(".")
        layer = theirs.get_submodule(place)
        if layer._parameters[leaf].dtype == own[name].dtype:
            layer._parameters[leaf] = nn.Parameter(own[name].data, requires_grad=False)


def _copied(model, share: bool = False):
    """A plain patcher on a deep copy of MODEL's network as it was loaded, without the patches that are in it now.

    share: its weights are in the memory of MODEL's.
    """
    inner = model.model
    keep = [inner.model_config, inner.latent_format]
    memo = {id(inner.current_patcher): None} | {id(thing): thing for thing in keep}
    for tensor in [*inner.parameters(), *inner.buffers()]:  # an inference tensor cannot be deep-copied
        if tensor.is_inference() or share:
            data = _another(tensor, share)
            memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
    patcher = comfy.model_patcher.ModelPatcher(copy.deepcopy(inner, memo), model.load_device, model.offload_device)
    patcher.backup = {key: saved._replace(weight=_another(saved.weight, share)) for key, saved in model.backup.items()}
    patcher.object_patches_backup = dict(model.object_patches_backup)
    patcher.unpatch_model(model.offload_device)
    return patcher


def _another(tensor: torch.Tensor, share: bool) -> torch.Tensor:
    """A tensor that autograd accepts: a copy, or one of the same memory where ``share`` asks for it.

    A quantized one of the host is always copied. A class that has no copy to give (ComfyUI-GGUF's tensors, which a
    loader maps from the file and nobody writes to) is given another tensor of the same memory.
    """
    if share and type(tensor.data) is torch.Tensor:
        return _same_memory(tensor)
    copied = tensor.clone()
    return _same_memory(tensor) if copied.is_inference() else copied


def _same_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory, which autograd accepts."""
    raw = tensor.as_subclass(torch.Tensor)
    same = torch.empty(0, dtype=raw.dtype, device=raw.device)
    same = same.set_(raw.untyped_storage(), raw.storage_offset(), raw.size(), raw.stride()).as_subclass(
        type(tensor.data)
    )
    same.__dict__.update(vars(tensor))
    return same


def trainable_model(model):
    """The host's model_base object ``model`` once more around a network of its own with float32 weights to train.

    The patches that are in the weights stay in them; everything frozen (config, latent format, sampling) is shared, and
    nothing that was hooked onto the network comes along. Its blocks must have their own forwards (`ComfyBackend`).
    Weights that no file could bring into a MODEL stay as they are (Wan's modulations, Lumina's padding tokens).
    Raises ValueError for quantized weights, which have no gradient.
    """
    network, memo = model.diffusion_model, {}
    check_in_full(network)
    for tensor in [*network.parameters(), *network.buffers()]:
        value = tensor.detach().clone()
        value = value.float() if value.is_floating_point() else value
        memo[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    trained = copy.deepcopy(network, memo)
    for module in trained.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        if isinstance(module, comfy.ops.CastWeightBiasOp):
            module.comfy_cast_weights = True  # weights follow the precision of what comes in
        _freeze_loose(module)
    trained.dtype = torch.float32
    twin = copy.copy(model)
    twin._modules = {**model._modules, "diffusion_model": trained}
    twin.manual_cast_dtype, twin.current_patcher = torch.float32, None
    return twin


def _freeze_loose(module: nn.Module) -> None:
    """Make buffers of the parameters a module has beside its layers: the host never patches those."""
    own = dict(module.named_parameters(recurse=False))
    if own and len(own) < sum(1 for _ in module.parameters()):
        for name, value in own.items():
            delattr(module, name)
            module.register_buffer(name, value.data)


def forget(patcher) -> None:
    """Give the copy's memory back without moving it anywhere first."""
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if entry.model is not patcher]
    comfy.model_management.soft_empty_cache()
