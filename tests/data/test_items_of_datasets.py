"""Per-item tensors in a dataset: stored, read, bucketed, mixed and checked like its latents."""

from __future__ import annotations

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.data.fits import check_fits
from distill_core.data.mix import new_mix, open_data
from distill_core.data.real import save_latents
from distill_core.data.shards import Shard, fill
from distill_core.models.denoiser import Cond, Denoiser, Guided, Limits

INPAINTING = ("inpaint_mask", "masked_image")


def save(folder, count: int = 6, size=(4, 6), seed: int = 0, more=lambda index: {}, masks: bool = True):
    """Latents [4, H, W]; item i has i in its masked image, and a mask of its own."""
    g, (height, width) = torch.Generator().manual_seed(seed), size
    latents = [torch.randn(4, height, width, generator=g) for _ in range(count)]
    cond, empty = toy.toy_conds(1)
    conds = []
    for index in range(count):
        own = {
            "inpaint_mask": (torch.rand(1, 1, height, width, generator=g) > 0.5).float(),
            "masked_image": torch.full((1, 4, height, width), float(index)),
        }
        conds.append(cond.with_items({**(own if masks else {}), **more(index)}))
    save_latents(latents, conds, empty, folder)
    return latents, conds, LatentDataset(folder)


def test_every_item_keeps_its_own(tmp_path):
    latents, conds, dataset = save(tmp_path)
    assert dataset.conditions == list(INPAINTING) and len(dataset.buckets) == 1
    batch = dataset.batch(0, 4, seed=1)
    for latent, mask, image in zip(batch.latents, *(batch.cond.extra[name] for name in INPAINTING), strict=True):
        index = int(image.max())
        assert torch.equal(latent, latents[index]) and torch.equal(mask, conds[index].extra["inpaint_mask"][0])
    rows = dataset.batch(0, 4, seed=1, part=(1, 2))  # the part of one of two processes
    assert torch.equal(rows.cond.extra["masked_image"], batch.cond.extra["masked_image"][2:])


def test_numbers_stay_on_the_cpu_and_reference_images_of_one_size_share_a_batch(tmp_path):
    sides = [(3, 3), (5, 2)]
    more = lambda i: {  # noqa: E731
        "reference_image#0": torch.zeros(1, 4, *sides[i % 2]),
        "text_strength": torch.tensor([float(i)]),
    }
    _, _, dataset = save(tmp_path, more=more, masks=False)
    assert dataset.conditions == ["reference_image#0", "text_strength"] and len(dataset.buckets) == 2
    shapes = {tuple(dataset.batch(n, 3, 0).cond.extra["reference_image#0"].shape) for n in range(6)}
    assert shapes == {(3, 4, 3, 3), (3, 4, 5, 2)}
    told = dataset.batch(0, 3, 0).to("meta").cond.extra["text_strength"]
    assert told.device.type == "cpu" and set(told.tolist()) <= set(map(float, range(6)))


def test_what_no_network_is_told_travels_beside(tmp_path):
    """The rejected latent of a pair is learnt from as the latent is; items without one are another bucket."""
    worse = torch.randn(3, 4, 4, 6)
    cond, empty = toy.toy_conds(3)
    make = lambda items, shard: {  # noqa: E731
        "latents": 1 + worse[items],
        **cond[items].tensors(),
        "rejected": worse[items],
    }
    for _ in fill(tmp_path, [Shard(range(3), (4, 6))], make, 2, "float32", {}):
        pass
    batch = LatentDataset(tmp_path).batch(0, 3, 0)
    assert torch.equal(batch.beside["rejected"] + 1, batch.latents) and batch.cond.extra == {}
    assert batch.to("meta").beside["rejected"].device.type == "meta" and LatentDataset(tmp_path).conditions == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(inpaint_mask=torch.full((3, 1, 4, 6), 255.0)), "cannot be stored: .* from 255 to 255, .* from 0 to 1"),
        (dict(inpaint_mask=torch.zeros(3, 1, 8, 12)), r"inpaint_mask is \[1, 8, 12\] .* is \[1, 4, 6\]"),
        (dict(masked_image=torch.zeros(3, 16, 4, 6)), r"masked_image is \[16, 4, 6\] .* is \[4, 4, 6\]"),
    ],
)
def test_what_is_not_as_declared_is_not_written(tmp_path, wrong, message):
    cond = toy.toy_conds(3)[0].with_items(wrong)
    make = lambda items, shard: {"latents": torch.randn(3, 4, 4, 6), **cond.tensors()}  # noqa: E731
    with pytest.raises(ValueError, match=message):
        list(fill(tmp_path, [Shard(range(3), (4, 6))], make, 3, "float32", {}))
    assert not list(tmp_path.glob("shard*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "extra.inpaint_mask": t["extra.inpaint_mask"][:, :, :2].contiguous()},
            "cache the dataset again",
        ),
        (
            lambda t: {**t, "extra.inpaint_mask": 2 + t["extra.inpaint_mask"]},
            "is damaged: extra.inpaint_mask has values",
        ),
    ],
)
def test_a_changed_file_is_refused_in_words(tmp_path, change, message):
    _, _, dataset = save(tmp_path)
    save_file(change(load_file(dataset.paths[0])), dataset.paths[0], {"state_sigmas": "[]"})
    with pytest.raises(ValueError, match=message):
        LatentDataset(tmp_path).batch(0, 4, 0)


def test_datasets_are_mixed_that_tell_the_network_the_same(tmp_path):
    for name, masks in (("a", True), ("b", True), ("plain", False)):
        save(tmp_path / name, masks=masks, seed=len(name))
    mixed = open_data(new_mix({tmp_path / "a": 1.0, tmp_path / "b": 1.0}))
    assert mixed.conditions == list(INPAINTING) and "masked_image" in mixed.batch(1, 4, 0).cond.extra
    with pytest.raises(
        ValueError, match="a has inpaint_mask and masked_image and .*plain has no per-item tensors: .*same"
    ):
        open_data(new_mix({tmp_path / "a": 1.0, tmp_path / "plain": 1.0}))
    open_data(new_mix({tmp_path / "plain": 1.0}))


def test_a_dataset_without_what_the_network_takes_is_refused(tmp_path):
    _, _, plain = save(tmp_path / "plain", masks=False)
    _, _, masked = save(tmp_path / "masked")
    needs = Limits(channels=4, items=INPAINTING)
    check_fits(masked, needs)
    check_fits(masked, Limits(channels=4))  # a network that takes none of it
    with pytest.raises(ValueError, match=r"plain has no inpaint_mask \(a mask, .*takes inpaint_mask and masked_image"):
        check_fits(plain, needs)
    with pytest.raises(
        ValueError, match=r"masked has no source_image \(the latent of the picture that is to be edited"
    ):
        check_fits(masked, Limits(channels=4, items=("source_image",)))


def test_a_teachers_samples_are_told_and_stored_what_belongs_to_each(tmp_path):
    """Seven items of three prompts, made in batches of three: the tensors go by the item."""
    told = []

    class Listening(Denoiser):
        def __call__(self, x, sigma, cond: Cond):
            told.append(cond.extra["text_strength"].tolist())
            return super().__call__(x, sigma, cond)

    conds, empty = toy.toy_conds()
    config = CacheConfig(count=7, steps=1, sizes=((4, 6),), batch_size=3, text_strength=(3.0, 10.0))
    teacher = Guided(Listening(toy.ToyBackend()), empty, 2.0)
    for _ in cache_latents(teacher, conds, 4, config, tmp_path):
        pass
    drawn = config.strengths(range(7))["text_strength"].tolist()
    assert told == [drawn[:3] * 2, drawn[3:6] * 2, drawn[6:] * 2]  # with the text and without
    assert len(set(drawn)) == 7 and min(drawn) >= 3 and max(drawn) <= 10
    dataset = LatentDataset(tmp_path)
    (items,) = dataset.buckets.values()
    found = dataset.read(items).cond
    assert found.extra["text_strength"].tolist() == drawn and found.extra["image_strength"].tolist() == [1.0] * 7
    assert torch.equal(found.context, conds[[0, 1, 2, 0, 1, 2, 0]].context) and dataset.uncond().extra == {}
