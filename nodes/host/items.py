"""Per-item tensors of a dataset (`models.items`) as what the host's own nodes tell its models of a picture.

Which of them a model takes is read from the host's class and its network's channels, as the host itself does. Its nodes
are InpaintModelConditioning and InstructPixToPixConditioning: a latent in the autoencoder's units, a mask in pixels. A
third is ReferenceLatent, for models that are shown pictures as further tokens; no file says whether one has learnt to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_base
from torch import Tensor, nn

from ...distill_core.data.dataset import LatentDataset
from ...distill_core.models.denoiser import Cond
from ...distill_core.models.items import (
    EXTRA,
    IMAGE_STRENGTH,
    ITEM_TENSORS,
    MASK,
    MASKED_IMAGE,
    PIXEL_MASK,
    PIXELS,
    REFERENCE,
    SOURCE_IMAGE,
    TEXT_STRENGTH,
    conditions,
    kind,
    missing,
)

STRENGTHS = (TEXT_STRENGTH, IMAGE_STRENGTH)
# In a CONDITIONING, as the host's nodes write them.
IMAGE_VALUE, MASK_VALUE, REFERENCE_VALUE = "concat_latent_image", "concat_mask", "reference_latents"
BY_REFERENCE = (comfy.model_base.Flux, comfy.model_base.QwenImage)  # FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit


def items_of(model) -> tuple[str, ...]:
    """Names of the per-item tensors that a model of the host (model_base) takes beside a latent; none of most."""
    if isinstance(model, comfy.model_base.Flux):
        return _flux_items(model)
    if isinstance(model, comfy.model_base.IP2P):
        return (SOURCE_IMAGE,)
    return (MASK, MASKED_IMAGE) if tuple(model.concat_keys) == ("mask", "masked_image") else ()


def takes_references(model) -> bool:
    """Whether a model of the host (model_base) can be shown pictures to go by, and need not be."""
    return isinstance(model, BY_REFERENCE) and not items_of(model)


def _flux_items(model) -> tuple[str, ...]:
    network = model.diffusion_model
    if not hasattr(network, "img_in"):  # of pixels
        return ()
    latent = model.model_config.unet_config["out_channels"]
    given = network.img_in.in_features // network.patch_size**2  # of the layer: quantized weights have other shapes
    if given <= latent:
        return ()
    return (SOURCE_IMAGE,) if given <= 2 * latent else (MASKED_IMAGE, PIXEL_MASK)


def host_values(model, extra: Mapping[str, Tensor]) -> dict[str, Any]:
    """The per-item tensors [1, ...] of a conditioning as values of a CONDITIONING, without the strengths, which no
    network of the host is told, and without a picture of no tokens (`guidance.without_picture`). Raises as
    `check_takes`."""
    own, values = conditions(extra), {}
    check_takes(model, own)
    for name, value in own.items():
        if name in STRENGTHS or value.numel() == 0:
            continue
        if kind(name) == REFERENCE:
            values.setdefault(REFERENCE_VALUE, []).append(latents_out(model, value))
        elif name in (MASKED_IMAGE, SOURCE_IMAGE):
            values[IMAGE_VALUE] = latents_out(model, value)
        elif name == MASK:
            values[MASK_VALUE] = value
        else:
            values[MASK_VALUE] = nn.functional.pixel_shuffle(value, PIXELS)
    return values


def latents_out(model, latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] of a dataset as the host's nodes have them: in the autoencoder's units, and one frame of a
    video model."""
    return model.process_latent_out(latents.unsqueeze(2) if model.latent_format.latent_dimensions == 3 else latents)


def check_takes(model, names: Mapping[str, object] | list[str]) -> None:
    """Raises ValueError for per-item tensors that a model of the host has no input for.

    Strengths, at which a teacher is guided, go with a model that edits.
    """
    taken = items_of(model)
    shown = (REFERENCE,) if takes_references(model) else ()
    known = (*taken, *shown, *STRENGTHS) if shown or SOURCE_IMAGE in taken else taken
    if foreign := [name for name in names if kind(name) not in known]:
        what = " and ".join(f"{name} ({ITEM_TENSORS[kind(name)].what})" for name in foreign)
        raise ValueError(
            f"the items of this dataset have {what}, and this model has no input for it in the graph: choose the "
            "inpainting or editing model that the dataset is for, or make a dataset without"
        )


def check_makes(model, masked: bool, sourced: bool) -> tuple[str, ...]:
    """The per-item tensors that pictures with or without masks, or sources, are to have for a model of the host.

    Raises ValueError for masks or sources that the model takes none of, and for none where it does.
    """
    taken = items_of(model)
    if sourced and takes_references(model):
        if masked:
            raise ValueError("a model that is shown a source takes no masks: set masks or source_folder to none")
        return (REFERENCE,)
    if sourced and SOURCE_IMAGE not in taken:
        raise ValueError(
            "sources are for models that edit pictures, and this one has no input for them: set source_folder to none, "
            "or load a model that edits"
        )
    if SOURCE_IMAGE in taken:
        if not sourced:
            raise ValueError(
                "this model edits pictures, so an item is a picture before and after: choose the folder of the "
                "pictures before in source_folder"
            )
        if masked:
            raise ValueError("this model edits pictures and takes no masks: set masks to none")
        return taken
    if masked and not taken:
        raise ValueError(
            "masks are for inpainting models, and this one has no input for them: set masks to none, or load an "
            "inpainting model"
        )
    if taken and not masked:
        raise ValueError(
            "this model fills what a mask hides: set masks to random, or to files or alpha for masks of your own"
        )
    return taken


def check_told(model, conds: Sequence[Cond]) -> None:
    """Raises ValueError for a model that takes more of every picture than the text, and conditionings without it."""
    if (taken := items_of(model)) and any(IMAGE_VALUE not in cond.extra for cond in conds):
        raise ValueError(
            f"this model takes {' and '.join(taken)} of every picture, and these conditionings are text alone: use "
            "Picture Folder with masks (with source_folder for a model that edits), or connect the outputs of "
            "InpaintModelConditioning (of InstructPixToPixConditioning)"
        )


def check_dataset_items(model, dataset: LatentDataset) -> None:
    """Raises ValueError for a dataset without a tensor that the model takes of every picture, or with another.

    A conditioning of the host's own nodes may bring it under their names.
    """
    check_takes(model, dataset.conditions)
    taken = items_of(model)
    for member in dataset.members:
        brought = {name.removeprefix(EXTRA) for file in member.files for name in file.keys()}
        lacking = "" if IMAGE_VALUE in brought else missing(taken, dict.fromkeys(brought))
        if lacking:
            how = f"{'source_folder' if SOURCE_IMAGE in taken else 'masks'} of Picture Folder"
            raise ValueError(
                f"the dataset {member.folder.name} has no {lacking}, and this model takes {' and '.join(taken)} of "
                f"every picture beside its latent; make it with {how}, or train a model without such an input"
            )
