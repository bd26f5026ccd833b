"""What recipes and the doctor know of a model, whatever program holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..diffusion.process import NoiseProcess
from .origin import LoraBelow


@dataclass(frozen=True)
class TurboLora:
    """A LoRA with a description of ours. layers: how many of its layers the model has taken up.  strength: of them."""

    name: str
    metadata: dict[str, str]
    layers: int = 1
    strength: float = 1.0


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe depends on.

    family: architecture as in the table of presets, None if it is none of them.  process: sigma of a timestep and the
    like (`process.py`; ComfyUI's ``model_sampling``).  table: a discrete model's sigmas [T], None for flow models.
    metadata: strings from the checkpoint's or LoRA's file.  loras: the turbo LoRAs on it, if the host tells.
    strengths: those of all LoRAs on its weights, each once; None where that is not known.  guidance_embedded: whether
    the network has guidance as an input, None where that is not known.
    base, below: digests of the weights and of all LoRAs on them, over names of ``layout``, to compare with where a
    student was made (`origin`); "" where they are not known.
    """

    family: str | None
    process: NoiseProcess
    table: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    loras: tuple[TurboLora, ...] = ()
    strengths: tuple[float, ...] | None = None
    guidance_embedded: bool | None = None
    base: str = ""
    layout: str = ""
    below: Sequence[LoraBelow] = ()


@dataclass(frozen=True)
class SamplingFacts(ModelFacts):
    """`ModelFacts` and how the connected MODEL is set up, beside how its family is by nature.

    timestep_of, native_timestep_of: sigma [N] -> the network's time input, as set up and by nature.  patched: a
    ModelSampling node sits before the model.  shift_alpha, native_shift_alpha: the factor that its schedulers shift
    flow levels with, None for other models.  audio_shift: that of the sound, in models that make both.  noise_scale,
    native_noise_scale: what its noise is multiplied by.  prediction, native_prediction: names of what the network's
    output is taken for.
    """

    timestep_of: Callable[[Tensor], Tensor] = lambda sigma: sigma
    native_timestep_of: Callable[[Tensor], Tensor] = lambda sigma: sigma
    patched: bool = False
    shift_alpha: float | None = None
    native_shift_alpha: float | None = None
    audio_shift: float | None = None
    noise_scale: float = 1.0
    native_noise_scale: float = 1.0
    prediction: str = ""
    native_prediction: str = ""
