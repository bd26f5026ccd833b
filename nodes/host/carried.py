"""What a MODEL carries beside its weights, and which of it a student cannot be trained through.

Training has a copy of the network of its own. What MODEL carries as data or as functions of the network's inputs works
on the copy as well: ModelSampling nodes, attention and block patches (FreeU, IP-Adapter), guidance. What is bound to
the loaded network, or run by the host's sampler around it, would be left out without a word: it is named and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

# transformer_options that say how the network is run, not what it answers.
NO_ANSWER = ("optimized_attention_override", "wrappers", "callbacks")
# Object patches that training takes from MODEL itself; others must be plain data.
OWN_OBJECTS = ("model_sampling", "latent_format")
PLAIN = (str, int, float, bool, type(None), torch.dtype)


class Carried(NamedTuple):
    """name: of what MODEL carries, as the user would look for it.  spelled: the same with its settings, for a hash.
    cure: why it cannot be trained through and what to do, empty where it can be."""

    name: str
    spelled: str
    cure: str = ""


def check_teachable(model) -> None:
    """Raises ValueError for a MODEL that carries what a student cannot be trained through, with what to do."""
    refused = [f"{thing.name} ({thing.cure})" for thing in carried(model) if thing.cure]
    if refused:
        raise ValueError(f"the model carries what a student cannot be trained through: {'; '.join(refused)}")


def carried(model) -> list[Carried]:
    """What decides MODEL's answers beside weights and patches on them, except its noise process and its guidance."""
    return sorted({*_injections(model), *_hooks(model), *_functions(model), *_objects(model), *_options(model)})


def _injections(model) -> Iterator[Carried]:
    for name, injections in model.injections.items():
        tensors = [f"{hook.multiplier}" for entry in injections for hook in _bypass_hooks(entry)]
        cure = "it is bound to the loaded network: take the node that adds it out before training"
        if name == "bypass_lora":
            cure = "load it with LoraLoaderModelOnly instead of the bypass loader"
        yield Carried(f"the injection {name}", f"injection {name} {len(tensors)} {sorted(set(tensors))}", cure)


def _bypass_hooks(injection) -> list:
    """The hooks of the host's bypass LoRAs, which their injection's function holds; none of others."""
    cells = getattr(injection.inject, "__closure__", None) or ()
    return [hook for cell in cells for hook in getattr(cell.cell_contents, "hooks", ())]


def _hooks(model) -> Iterator[Carried]:
    if model.forced_hooks is not None or model.hook_patches:
        cure = "they are switched by the host's sampler: load LoRAs with LoraLoaderModelOnly"
        yield Carried("hooks", "hooks", cure)


def _functions(model) -> Iterator[Carried]:
    cure = "only the host's sampler runs it: take its node out before training"
    wrapper = model.model_options.get("model_function_wrapper")
    if wrapper is not None:
        yield Carried(f"the model function wrapper {_name(wrapper)}", f"function {_spell(wrapper)}", cure)
    for name, functions in model.weight_wrapper_patches.items():
        cure = "it changes a weight while it runs: load it as a LoRA"
        yield Carried(f"a weight wrapper on {name}", f"weight wrapper {name} {len(functions)}", cure)
    own = model.model_options["transformer_options"].get("wrappers", {})
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        for source in (model.wrappers, own):
            for key, wrappers in source.get(kind, {}).items():
                for wrapper in wrappers:
                    name = key or _name(wrapper)
                    cure = "it is made for sampling: take its node out before training"
                    yield Carried(f"the wrapper {name}", f"wrapper {kind} {name} {_spell(wrapper)}", cure)


def _objects(model) -> Iterator[Carried]:
    for name, value in model.object_patches.items():
        if name in OWN_OBJECTS:
            continue
        plain = isinstance(value, PLAIN)
        cure = "" if plain else "it is bound to the loaded network: take the node that sets it out before training"
        yield Carried(f"a patch of {name}", f"object {name} {value if plain else _spell(value)}", cure)


def _options(model) -> Iterator[Carried]:
    for option, value in model.model_options["transformer_options"].items():
        for name, part in _leaves(option, value) if option not in NO_ANSWER else ():
            bound = _holds_module(part, {id(module) for module in model.model.modules()})
            cure = "it is bound to the loaded network: take its node out before training" if bound else ""
            yield Carried(f"{name} of {_name(part)}", f"option {name} {_spell(part)}", cure)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The functions and settings in nested dicts and lists, each with the names that lead to it."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{name} {key}", part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(name, part)
    else:
        yield name, value


def _parts(function: Any) -> list[Any]:
    """What a function or a callable object holds: closure, bound object, attributes."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    attributes = getattr(function, "__dict__", {}) if not isinstance(function, nn.Module) else {}
    return [*cells, *attributes.values(), *([function.__self__] if hasattr(function, "__self__") else [])]


def _holds_module(value: Any, modules: set[int], depth: int = 3) -> bool:
    if id(value) in modules:
        return True
    parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else _parts(value)
    return depth > 0 and any(_holds_module(part, modules, depth - 1) for part in parts)


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return name.split(".<locals>")[0]


def _spell(value: Any) -> str:
    """A function by its name and the plain values that it holds; the same in another session."""
    if isinstance(value, PLAIN):
        return repr(value)
    return " ".join([_name(value), *(repr(part) for part in _parts(value) if isinstance(part, PLAIN))])
