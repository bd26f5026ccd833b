"""Pictures of a student in training where the items of its dataset have tensors of their own, in several sizes."""

from __future__ import annotations

import pytest
import torch
from networks import build_cond

from distill_core.data.dataset import LatentDataset
from distill_core.data.real import save_latents
from distill_core.evaluation.student_pictures import StudentPictures, first_items
from distill_core.methods.components import Components
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import new_method
from distill_core.training.loop import Run, TrainConfig
from distill_core.training.student import StudentConfig


@pytest.mark.parametrize("seed", range(4))  # the first batch is of either size
def test_pictures_are_of_items_of_their_size(make_backend, tmp_path, seed):
    sizes, conds, latents = [(4, 6)] * 4 + [(6, 4)] * 2, [], []
    for number, (height, width) in enumerate(sizes):
        own = {"inpaint_mask": torch.ones(1, 1, height, width).tril(), "masked_image": torch.randn(1, 4, height, width)}
        conds.append(build_cond(1, seed=number).with_items(own))
        latents.append(torch.randn(4, height, width))
    save_latents(latents, conds, build_cond(1, seed=9), tmp_path)
    dataset, backend = LatentDataset(tmp_path), make_backend("unet", in_channels=9)
    config = LADDConfig({"denoising": 1.0})
    method = new_method(config, Components(backend), dataset.batch(0, 2, 0), 2, uncond=dataset.uncond())
    run = Run(method, dataset, TrainConfig(steps=1, batch_size=2, seed=seed))
    seen = []

    def decode(latents):
        seen.append(torch.cat(list(latents)))
        return torch.zeros(len(latents), 8, 8, 3)

    pictures, items = StudentPictures.of_items(run, StudentConfig(2), first_items(run), decode), first_items(run)
    assert dataset.shapes[0] == (4, 4, 6) and {tuple(x.shape) for x in pictures.latents()} == {(1, 4, 4, 6)}
    # What is drawn: what the student is given, and what it made of it, outside of the mask the picture itself.
    made, _ = torch.cat(pictures.latents()), pictures()
    given, drawn = seen
    mask = items.cond.extra["inpaint_mask"].bool().expand_as(made)
    assert torch.equal(given, items.cond.extra["masked_image"])
    assert torch.equal(drawn[mask], made[mask]) and torch.equal(drawn[~mask], items.latents[~mask])
    assert mask.any() and not mask.all()
    pictures()
    assert len(seen) == 3, "what the student is given is decoded once"
