"""Who teaches: the model itself or, where a run says so, a LoRA on it or another model of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..digests import weights_digest
from ..files import DTYPES, load_tensors
from ..settings import Checked, setting
from .backends.diffusers import DiffusersBackend
from .backends.diffusers_folders import load_backend
from .denoiser import Denoiser
from .lora_stack import frozen_lora
from .pipelines import SHIPPED, MiniSource, ModelConfig, PipelineSource


@dataclass(frozen=True)
class TeacherConfig(Checked):
    """The teacher of a student, where it is not the model as it is."""

    path: str = setting(
        "",
        'The folder of a diffusers pipeline, or "mini", that teaches in place of [model] path: another checkpoint or '
        "size, of the same latents and text encoders. Only its network is opened. Empty: the model itself.",
        decides=False,
        added=True,
    )
    lora: str = setting(
        "",
        "A LoRA file that is on in the teacher and not in the student: one of preference tuning (Diffusion-DPO; LADD "
        "section 4.5), for example. It takes no second network. Empty: none.",
        decides=False,
        added=True,
    )
    guidance: float = setting(
        0.0,
        "Guidance scale of the teacher in the distillation, consistency and distribution_matching terms. 0: that of "
        "the dataset, which is 1 for own pictures.",
        decides=False,
        added=True,
        low=0,
        high=100,
    )

    @property
    def other(self) -> bool:
        """Whether it is another teacher than the model itself."""
        return bool(self.path or self.lora)

    def called(self) -> str:
        """Its name in files and messages."""
        names = [Path(path).name for path in (self.path, self.lora) if path]
        return " with ".join(names) if self.path else f"the model with {names[0]}"


@dataclass(frozen=True)
class Teacher:
    """Another teacher than the model itself.

    view: what it computes, with its name.  digest: of its weights, the LoRA's with them.
    """

    view: Denoiser
    digest: str

    @property
    def name(self) -> str:
        return self.view.name


def open_teacher(
    config: TeacherConfig,
    model: ModelConfig,
    source: MiniSource | PipelineSource,
    place: Callable[[DiffusersBackend], None] | None = None,
) -> Teacher | None:
    """The teacher that ``config`` names, None for the model itself, which ``source`` has opened.

    place: brings a network of its own to where it is to be, None for the source's device.
    Raises ValueError for a folder without a network that is known, or a LoRA that does not fit it.
    """
    if not config.other:
        return None
    backend = source.backend
    if config.path:
        backend = teachers_backend(config.path, model)
        if place is None:
            backend.network.to(source.device)
        else:
            place(backend)
    lora, digest = None, backend.digest()
    if config.lora:
        lora = frozen_lora(backend, config.lora, "[teacher] lora")
        digest = f"{digest}+{weights_digest(load_tensors(config.lora)[0])}"
    return Teacher(Denoiser(backend, lora, name=config.called()), digest)


def teacher_view(config: TeacherConfig, model: ModelConfig, source: MiniSource | PipelineSource) -> Denoiser:
    """What teaches: the model that ``source`` has opened, or who ``config`` names."""
    other = open_teacher(config, model, source)
    return other.view if other else Denoiser(source.backend)


def teachers_backend(path: str, model: ModelConfig, weights: bool = True) -> DiffusersBackend:
    """The network of [teacher] path, in the number format of [model].  weights: as for `load_backend`."""
    if path in SHIPPED:
        return SHIPPED[path](replace(model, path=path, loras=())).backend
    if not Path(path).is_dir():
        raise ValueError(
            f"[teacher] path: {path} is not a folder; give a diffusers pipeline folder, or one of {', '.join(SHIPPED)}"
        )
    return load_backend(path, DTYPES[model.dtype], model.gradient_checkpointing, weights)


@torch.no_grad()
def to_train(teacher: Denoiser, view: Denoiser) -> Denoiser:
    """A trainable view of the teacher's network, made without its LoRA, as one that begins as the teacher does."""
    if teacher.lora is not None:
        if view.lora is not None:
            view.lora.over = (teacher.lora,)
        else:
            teacher.lora.put_into(view.backend.network)
    return view
