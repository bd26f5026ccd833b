"""Another teacher than the model itself: whether it can teach it, and whether it has made the dataset.

Its latents and its conditioning must be the model's, since both are given the same batch; its size may be another.
"""

from __future__ import annotations

import torch

from ..data.dataset import Batch, LatentDataset
from ..errors import first_line
from ..methods.components import Components
from ..methods.config import MethodConfig
from ..models.denoiser import Backend, Denoiser
from ..models.teachers import Teacher

TIME = 0.5  # flow time of the forwards that are compared


def check_other_teacher(teacher: Teacher, method: MethodConfig, model: Backend, batch: Batch) -> None:
    """Refuse a teacher whose latents, conditioning or noise process are not the model's.  batch: of one item.

    Raises ValueError.
    """
    other = teacher.view.backend
    if method.own_teacher:
        raise ValueError(own_teacher_only(method))
    if other is model:
        return
    theirs, own = other.limits(), model.limits()
    for what, a, b in (
        ("latents of {} channels", theirs.channels, own.channels),
        ("text tokens of width {}", theirs.context, own.context),
        ("a pooled text of width {}", theirs.pooled, own.pooled),
    ):
        if None not in (a, b) and a != b:
            raise ValueError(
                f"the teacher {teacher.name} takes {what.format(a)}, the model {what.format(b)}: a teacher must share "
                "autoencoder and text encoders with the model; choose another size or checkpoint of its kind"
            )
    kinds = [type(backend.process).__name__.removesuffix("Process").lower() for backend in (other, model)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the teacher {teacher.name} has another noise process than the model ({kinds[0]}, {kinds[1]}): a noised "
            "latent of one means nothing to the other; choose a teacher of the model's kind"
        )
    shapes = []
    for name, view in (("model", Denoiser(model)), (f"teacher {teacher.name}", teacher.view)):
        try:
            shapes.append(_answer(view, batch).shape)
        except Exception as error:  # whatever its network says of a tensor that it does not know
            raise ValueError(
                f"the {name} cannot compute an item of the dataset ({first_line(error)}): latents and conditioning "
                "must be those of both, model and teacher"
            ) from error
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the teacher {teacher.name} answers with latents {list(shapes[1])}, the model with {list(shapes[0])}: "
            "choose a teacher of the model's latent space"
        )


def own_teacher_only(method: MethodConfig) -> str:
    """Why a method can have no other teacher."""
    return f"with {method.title} the model is its own teacher: leave [teacher] path and [teacher] lora empty"


@torch.no_grad()
def _answer(view: Denoiser, batch: Batch) -> torch.Tensor:
    x, process = batch.latents, view.process
    sigma = process.sigma_at_flow_time(x.new_full((len(x),), TIME))
    return view(process.noise_scaling(sigma, torch.zeros_like(x), x), sigma, batch.cond)


def maker(components: Components, dataset: LatentDataset, base: str) -> Denoiser | None:
    """Who made a dataset, the teacher unless it says that it was the model (``base``); None for a third one."""
    made_by, teacher = dataset.manifest().get("base"), components.teacher
    if teacher is None or made_by in (None, teacher.digest):
        return components.teacher_view
    return Denoiser(components.backend) if made_by == base else None


def teacher_notes(components: Components, dataset: LatentDataset) -> list[str]:
    """What is to be said of a teacher that has not made the dataset; nothing where it has, or nothing is known."""
    teacher = components.teacher
    if teacher is None:
        return []
    foreign = {
        member.folder.name: made_by
        for member in dataset.members
        if (made_by := member.manifest().get("base")) not in (None, teacher.digest)
    }
    return [
        f"the latents in {name} were made by another model ({made_by}) than the teacher, {teacher.name} "
        f"({teacher.digest}): they serve as pictures to learn from, and pairs keep the paths of their own model"
        for name, made_by in foreign.items()
    ]
