"""CONDITIONING of the host as the core's Cond, and a Cond as what the host's network is called with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...distill_core.models.denoiser import Cond, cat_conds
from ...distill_core.models.items import conditions
from .architectures import Architecture
from .items import host_values

# Settings in a CONDITIONING that mean the whole image at every step, and so can be left out.
NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "set_area_to_bounds": False}
RENAMED = {"pooled_output": "pooled", "guidance": "guidance"}
# Settings that only the host's sampler acts on: the network alone would ignore them.
SAMPLER_ONLY = ("mask", "mask_strength", "area", "default")
LIST = "#"  # "reference_latents#0": the first tensor of a list


def cond_of(conditioning: list) -> Cond:
    """A host's CONDITIONING, one row an entry (or as many as its tensors have), cloned out of inference mode.

    pooled_output and guidance have fields of their own; all other tensors, lists of tensors and numbers (reference and
    concat latents, masks, SDXL's sizes) are carried in ``extra`` under the host's names.
    Raises ValueError for what cannot be used for training (ControlNet, areas, hooks, ...), naming it.
    """
    if not conditioning:
        raise ValueError("the conditioning is empty: connect at least one prompt")
    entries = [_entry(context, options) for context, options in conditioning]
    tokens = max(entry.context.shape[1] for entry in entries)
    return cat_conds([_with_padded_mask(entry, tokens) for entry in entries])


def check_places(cond: Cond, architecture: Architecture) -> None:
    """Raises ValueError for values that move the image to where a discriminator would not look for it."""
    for name in architecture.misplacing:
        if any(key.partition(LIST)[0] == name for key in cond.extra):
            raise ValueError(
                f"a conditioning with {name} cannot be trained with on {architecture.name}, where it comes before the "
                "image; use plain text prompts"
            )


def _entry(context: Tensor, options: dict) -> Cond:
    tensors = {"context": context}
    for name, value in options.items():
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]) or _masks_nothing(name, value):
            continue
        key = RENAMED.get(name, f"extra.{name}")
        if name in SAMPLER_ONLY:
            raise ValueError(f"a conditioning with {name} cannot be trained with; use plain text prompts")
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
            tensors |= {f"{key}{LIST}{i}": part for i, part in enumerate(value)}
        elif isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, (int, float)) and name not in NEUTRAL:
            tensors[key] = torch.full((len(context),), float(value))
        else:
            raise ValueError(f"a conditioning with {name} cannot be trained with; use plain text prompts")
    rows = len(context)
    return Cond.from_tensors({name: _rows(value.detach().clone().float(), rows) for name, value in tensors.items()})


def _with_padded_mask(cond: Cond, tokens: int) -> Cond:
    mask = cond.extra.get("attention_mask")
    if mask is None:
        return cond
    mask = nn.functional.pad(mask, (0, tokens - mask.shape[1]))
    return replace(cond, extra={**cond.extra, "attention_mask": mask})


def _masks_nothing(name: str, value) -> bool:
    return name == "attention_mask" and isinstance(value, Tensor) and bool(value.all())


def _rows(value: Tensor, rows: int) -> Tensor:
    return value.expand(rows, *value.shape[1:]).contiguous() if len(value) == 1 else value


def conditioning_of(model, cond: Cond) -> list:
    """One row of a Cond as a CONDITIONING of the host: the inverse of `cond_of`, with per-item tensors as the host's
    nodes write them (`items.host_values`).

    model: the host's model_base object. Raises ValueError for per-item tensors that it has no input for.
    """
    tokens = cond.context.shape[1] if cond.mask is None else int(cond.mask.sum().item())
    own = conditions(cond.extra)
    values: dict = {"pooled_output": cond.pooled, **host_values(model, own)}
    if cond.guidance is not None:
        values["guidance"] = cond.guidance.item()
    for name, value in cond.extra.items():
        if name in own:
            continue
        base, is_list, _ = name.partition(LIST)
        if is_list:
            values.setdefault(base, []).append(value.clone())  # the host writes into some of them
        elif base == "attention_mask":
            values[base] = value[:, :tokens].long()  # a mask of floats would count as a bias
        else:
            values[base] = value.item() if value.ndim == 1 else value.clone()
    return [[cond.context[:, :tokens], {name: value for name, value in values.items() if value is not None}]]


def host_conds(model, cond: Cond, noise: Tensor, scale: int) -> dict:
    """One row of a Cond, processed by the host's own ``extra_conds`` for latents like ``noise`` [1, C, (1,) H, W].

    model: the host's model_base object.  scale: pixels per latent position. Raises ValueError when the model needs
    something that the conditioning lacks, or as `conditioning_of`.
    """
    ((context, values),) = conditioning_of(model, cond)
    size = {"width": noise.shape[-1] * scale, "height": noise.shape[-2] * scale}
    common = {
        "device": noise.device,
        "noise": noise,
        "latent_image": torch.zeros_like(noise),
        "prompt_type": "positive",
        "cross_attn": context,
    }
    try:
        conds = model.extra_conds(**{**size, **common, **values})
    except KeyError as error:
        raise ValueError(
            f"the conditioning lacks {error}, which this model needs: encode the prompts with its text encoders"
        ) from error
    return {name: value.process_cond(batch_size=1, area=None) for name, value in conds.items()}
