"""Copies of the host's networks for training: a frozen one with MODEL's patches, and one with trainable weights."""

from __future__ import annotations

import copy

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import nn


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
    patcher.parent = None  # or else the host would consider MODEL loaded once this copy is gone
    return patcher


def _copied(model):
    """A plain patcher on a deep copy of MODEL's network as it was loaded, without the patches that are in it now."""
    inner = model.model
    keep = [inner.model_config, inner.latent_format]
    memo = {id(inner.current_patcher): None} | {id(thing): thing for thing in keep}
    for tensor in [*inner.parameters(), *inner.buffers()]:  # an inference tensor cannot be deep-copied
        if tensor.is_inference():
            data = tensor.clone()
            memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
    patcher = comfy.model_patcher.ModelPatcher(copy.deepcopy(inner, memo), model.load_device, model.offload_device)
    patcher.backup = {key: saved._replace(weight=saved.weight.clone()) for key, saved in model.backup.items()}
    patcher.object_patches_backup = dict(model.object_patches_backup)
    patcher.unpatch_model(model.offload_device)
    return patcher


def trainable_model(model):
    """The host's model_base object ``model`` once more around a network of its own with float32 weights to train.

    The patches that are in the weights stay in them; everything frozen (config, latent format, sampling) is shared, and
    nothing that was hooked onto the network comes along. Its blocks must have their own forwards (`ComfyBackend`).
    Weights that no file could bring into a MODEL stay as they are (Wan's modulations, Lumina's padding tokens).
    Raises ValueError for quantized weights, which have no gradient.
    """
    network, memo = model.diffusion_model, {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        is_weight = isinstance(tensor, nn.Parameter)
        if is_weight and (type(tensor.data) is not torch.Tensor or not tensor.is_floating_point()):
            raise ValueError(
                f"a quantized network ({name}) cannot be copied to be trained: load a file in bfloat16, float16 or "
                "plain fp8"
            )
        value = tensor.detach().clone()
        value = value.float() if value.is_floating_point() else value
        memo[id(tensor)] = nn.Parameter(value) if is_weight else value
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
