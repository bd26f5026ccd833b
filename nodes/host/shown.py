"""What the report of a run is of: prompts, or items of its dataset that a model is to fill or to edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...distill_core.data.dataset import Batch
from ...distill_core.evaluation.student_pictures import given
from ...distill_core.files import load_tensors, save_tensors
from ...distill_core.models.denoiser import Cond
from ...distill_core.models.items import hole
from ...distill_core.presets.recipe import Recipe
from .conditioning import conditioning_of
from .items import latents_out
from .side_by_side import decode, empty_latent, sample_prompts

EMPTY = "empty."  # before the tensors of the empty conditioning, in the file


@dataclass(frozen=True)
class Shown:
    """Columns of a report, one prompt each.

    prompts: a CONDITIONING of each.  negative: of all, None where there is none.  negatives: of each, instead.  latent:
    [N, ...], in the host's units.  mask: [N, 1, H, W], of what is to be filled.  given: rows of latents above the
    models', in words.
    """

    prompts: Sequence[list]
    latent: Tensor
    negative: list | None = None
    negatives: Sequence[list] = ()
    mask: Tensor | None = None
    given: Sequence[tuple[str, Tensor]] = ()

    @property
    def guidable(self) -> bool:
        return self.negative is not None or bool(self.negatives)

    def row(self, model, vae, recipe: Recipe, seed: int) -> Tensor:
        """Images [N, H, W, 3] of a MODEL, the first of them from the noise (seed, 0)."""
        sampled = sample_prompts(
            model,
            self.prompts,
            self.negative,
            negatives=self.negatives,
            latent=self.latent,
            mask=self.mask,
            recipe=recipe,
            seed=seed,
        )
        return decode(vae, sampled)

    def given_rows(self, vae) -> list[tuple[str, Tensor]]:
        return [(text, decode(vae, latents)) for text, latents in self.given]


def of_prompts(model, prompts: Sequence[list], negative: list | None, shape: Sequence[int]) -> Shown:
    """Prompts from an empty latent of a shape [C, H, W]."""
    return Shown(prompts, empty_latent(model, len(prompts), shape), negative)


def items_file(folder: Path) -> Path:
    """In a run's folder: the items that its reports show, where its dataset's have tensors of their own."""
    return folder / "items.safetensors"


def keep_items(folder: Path, items: Batch, empty: Cond) -> None:
    """Keep the items in a run's folder, so that a report needs no dataset."""
    tensors = {"latents": items.latents, **items.cond.tensors()}
    tensors |= {EMPTY + name: value for name, value in empty.tensors().items()}
    save_tensors(items_file(folder), {name: value.contiguous() for name, value in tensors.items()})


def of_items(model, folder: Path, most: int) -> Shown:
    """The first of the items that are kept in a run's folder, as the host's own nodes would have MODEL fill them."""
    tensors, _ = load_tensors(items_file(folder))
    inner, latents = model.model, tensors.pop("latents")[:most].float()
    empty = Cond.from_tensors({k.removeprefix(EMPTY): v for k, v in tensors.items() if k.startswith(EMPTY)})
    cond = Cond.from_tensors({k: v[:most].float() for k, v in tensors.items() if not k.startswith(EMPTY)})
    without = empty.rows_for(cond).map(torch.Tensor.contiguous)
    each = [[row] for row in range(len(latents))]
    return Shown(
        [conditioning_of(inner, cond[row]) for row in each],
        latents_out(inner, latents),
        negatives=[conditioning_of(inner, without[row]) for row in each],
        mask=hole(cond.extra),
        given=[(text, latents_out(inner, cond.extra[name])) for name, text in given(cond).items()],
    )
