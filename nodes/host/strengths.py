"""A student that is told the strengths to edit at (`distill_core.models.strengths`), as the host samples it.

What its file adds to the embedding of the timestep is one vector for a choice of strengths, so the MODEL gets a wrapper
of the network's call that adds it. Without the wrapper, as under any loader, the student has its default strengths.
"""

from __future__ import annotations

import comfy.patcher_extension
from torch import Tensor

from ...distill_core.files import load_tensors
from ...distill_core.lora_files import parse_description
from ...distill_core.models.items import IMAGE_STRENGTH, TEXT_STRENGTH
from ...distill_core.models.strengths import NAMES, added_at, chosen_strengths, split_strengths
from ...distill_core.presets.facts import TurboLora
from ...distill_core.presets.recipe import describe_metadata
from .architectures import architecture_of
from .folders import lora_path
from .loras import LAST, turbo_loras
from .sampling import ImageByImage

EMBEDDING = "turbo_distill_strengths"  # tensors that are attached to a trainer's MODEL
KIND = comfy.patcher_extension.WrappersMP.APPLY_MODEL


def with_strengths(model, text: float, image: float) -> tuple[object, str]:
    """A clone of MODEL that is told the strengths of text and picture, and a text that says them.

    text, image: 0 for the default of the student's file. Strengths that MODEL was told before are forgotten.
    Raises ValueError for a MODEL without a student that is told strengths, and for ones that it was not trained at.
    """
    lora = told_lora(model)
    told = parse_description(describe_metadata(lora.metadata))["strengths"]
    asked = {name: value for name, value in ((TEXT_STRENGTH, text), (IMAGE_STRENGTH, image)) if value}
    strengths = chosen_strengths(told, asked, lora.name, lambda name: name)
    embedding = model.attachments.get(EMBEDDING) if lora.name == LAST else None  # of a trainer's, not saved yet
    if not embedding:
        _, embedding = split_strengths(load_tensors(lora_path(lora.name))[0])
    added = lora.strength * added_at(told, embedding, strengths)
    layer = architecture_of(model.model.diffusion_model).modulation
    if not layer:
        raise ValueError(f"{lora.name} is told strengths, and this model has no place for them: it edits no picture")
    clone = model.clone()
    there = clone.wrappers.get(KIND, {}).get(ImageByImage.KEY, [])
    there[:] = [wrapper for wrapper in there if not isinstance(wrapper, ToldStrengths)]
    clone.add_wrapper_with_key(KIND, ImageByImage.KEY, ToldStrengths(layer, added, *strengths))
    said = [
        f"{name} {value:g} (trained from {low:g} to {high:g}, {default:g} where it is not told)"
        for name, value in zip(NAMES, strengths, strict=True)
        for low, default, high in [told[name]]
    ]
    return clone, "\n".join([f"{lora.name} is told:", *said])


def told_lora(model) -> TurboLora:
    """The LoRA on MODEL whose file says that its student is told strengths. Raises ValueError for none or several.

    Copies of one file are one.
    """
    told = [lora for lora in turbo_loras(model) if lora.layers and "strengths" in describe_metadata(lora.metadata)]
    found = [
        lora for i, lora in enumerate(told) if all(lora.metadata != other.metadata for other in told[:i])
    ]  # copies
    if not found:
        raise ValueError(
            "no LoRA on this model is of a student that is told strengths: load one that was trained with [strengths] "
            "told = true (docs/editing.md); others have the strengths of their training data"
        )
    if len(found) > 1:
        names = " and ".join(lora.name for lora in found)
        raise ValueError(f"{names} are each told strengths: leave one of them out")
    return found[0]


class ToldStrengths:
    """The wrapper. layer: of the network.  added: to its output, [1, D].  text, image: the strengths, for a hash."""

    def __init__(self, layer: str, added: Tensor, text: float, image: float) -> None:
        self.layer, self.added, self.text, self.image = layer, added, text, image

    def __call__(self, network, *args, **kwargs) -> Tensor:
        module = network.class_obj.diffusion_model.get_submodule(self.layer)
        handle = module.register_forward_hook(lambda module, given, output: output + self.added.to(output))
        try:
            return network(*args, **kwargs)
        finally:
            handle.remove()
