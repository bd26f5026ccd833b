"""Masks for inpainting: the kinds and their sizes, one stream an item, and files beside pictures."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.data.held_out import hold_out
from distill_core.data.masks import MaskConfig, for_latents, for_pixels, hidden, with_own_masks
from distill_core.data.pictures import PictureConfig, find, survey
from distill_core.data.random_masks import AREA, FULL, KINDS, random_masks
from distill_core.models import mini

SMALL, FILES = PictureConfig(size=64, step=16), MaskConfig(source="files")
EACH = {name: 1.0 for name in KINDS}
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda size: (16 * size[0], 16 * size[1]))


def masks(kind: str, items, size=(128, 128), seed: int = 0) -> torch.Tensor:
    return random_masks(seed, items, size, {kind: 1.0})


@hypothesis_settings(max_examples=60)
@given(kind=st.sampled_from(list(KINDS)), size=sizes, seed=st.integers(0, 2**31), item=st.integers(0, 10**6))
def test_a_mask_hides_a_fair_part(kind, size, seed, item):
    mask = masks(kind, [item], size, seed)
    assert mask.shape == (1, 1, size[1], size[0]) and set(mask.unique().tolist()) <= {0.0, 1.0}
    area = mask.mean().item()
    assert area == 1 if kind == FULL else AREA[0] <= area <= AREA[1]


@hypothesis_settings(max_examples=30)
@given(size=sizes, seed=st.integers(0, 2**31), items=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_a_mask_alone_is_the_one_in_a_batch(size, seed, items):
    together = random_masks(seed, items, size, EACH)
    for row, item in enumerate(items):
        assert torch.equal(together[row], random_masks(seed, [item], size, EACH)[0])


def test_items_seeds_and_kinds_differ():
    first = random_masks(0, range(8), (64, 64), EACH)
    assert len({mask.numpy().tobytes() for mask in masks("strokes", range(8))}) == 8
    assert not torch.equal(first, random_masks(1, range(8), (64, 64), EACH))


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_picture_has_the_same_mask_larger(kind):
    small, large = (masks(kind, range(20), (side, side)) for side in (128, 512))
    shrunk = (torch.nn.functional.avg_pool2d(large, 4) > 0.5).float()
    assert (shrunk != small).float().mean() < 0.02


def test_shares_are_those_that_are_set():
    """A mask that hides everything is full, and one in four is."""
    drawn = random_masks(3, range(600), (16, 16), {FULL: 1.0, "rectangles": 3.0})
    assert (drawn.mean((1, 2, 3)) == 1).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_the_sizes_are_those_of_lama_and_the_discs_ours():
    """At 256 pixels: rectangles of 30 to 100 with a margin of 10, borders of 4 to 25 %, discs of 5 to 25 %."""
    boxes = masks("rectangles", range(200), (256, 256))
    assert not boxes[:, :, :10].any() and not boxes[..., -10:].any() and boxes[:, :, 10:20].any()
    assert boxes.mean((1, 2, 3)).min() >= 30 * 30 / 256**2
    borders = masks("outpainting", range(200), (256, 256))[:, 0]
    for side in (borders[:, 128], borders[:, :, 128]):  # a cut through the middle: two borders at most
        ends = torch.stack([side.cumprod(1).sum(1), side.flip(1).cumprod(1).sum(1)])
        present = ends[ends > 0]
        assert 10 <= present.min() and present.max() <= 64 and 0.4 < (ends > 0).float().mean() < 0.65
    discs = masks("discs", range(200), (256, 256)).sum((1, 2, 3))
    assert discs.max() <= 4 * numpy.pi * 65**2 and discs.min() >= AREA[0] * 256**2


def test_latents_have_a_mask_where_any_pixel_is_hidden():
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 3, 20] = 1
    assert for_latents(mask, 8).tolist() == [[[[0, 0, 1], [0, 0, 0]]]]
    images = torch.ones(1, 3, 16, 24)
    assert torch.equal(hidden(images, mask), 1 - mask.expand_as(images))


def test_a_mask_in_pixels_is_the_order_of_fluxs_channels():
    """Channel 8 i + j of a position is the pixel in row i and column j of it."""
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 3, 20] = 1
    packed = for_pixels(mask)
    assert packed.shape == (1, 64, 2, 3) and packed.nonzero().tolist() == [[0, 3 * 8 + 4, 0, 2]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"source": "drawn"}, "none, random, files, alpha"),
        ({"source": "alpha", "folder": "masks"}, 'is for source = "files"'),
        ({"shares": {"circles": 1.0}}, "strokes, discs, rectangles, outpainting, full"),
        ({"shares": {"full": 0.0}}, "a share above 0"),
        ({"source": "files", "each": 2}, 'each = 2 needs source = "random"'),
        ({"each": 0}, "each"),
    ],
)
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**bad)


# Files


def picture(path, size=(64, 48), colour=(200, 30, 30)):
    Image.new("RGB", size, colour).save(path)


def mask(path, box=(0, 0, 16, 48), size=(64, 48), white=255):
    image = Image.new("L", size)
    image.paste(white, box)
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """Three pictures with masks; the second is a JPEG and turned as its EXIF says."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "c.png"):
        picture(images / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64), (30, 30, 200)).save(images / "b.jpg", exif=exif)
    for name in "abc":
        mask(images / f"{name}.mask.png")
    return tmp_path


def test_a_mask_is_no_picture_unless_it_is_alone(folder):
    mask(folder / "images" / "alone.mask.png")
    assert list(find(folder / "images")) == ["a.png", "alone.mask.png", "b.jpg", "c.png"]


def test_pictures_without_a_mask_that_fits_are_left_out_by_name(folder):
    images = folder / "images"
    for name in "defg":
        picture(images / f"{name}.png")
    mask(images / "e.mask.png", size=(64, 40))
    mask(images / "f.mask.png", white=100)
    (images / "g.mask.png").write_bytes(b"\x89PNG")
    pictures, _ = survey(images, SMALL)
    found, left_out = with_own_masks(pictures, FILES, SMALL)
    assert [p.name for p in found] == ["a.png", "b.jpg", "c.png"] and all(p.mask for p in found)
    assert left_out["d.png"] == "has no mask d.mask.png"
    assert left_out["e.png"] == "is 64 x 48 and its mask 64 x 40"
    assert left_out["f.png"] == "has a mask with nothing to fill (white)"
    assert left_out["g.png"].startswith("has a mask that cannot be read")
    with pytest.raises(ValueError, match="no picture has a mask .*: d.png has no mask d.mask.png"):
        with_own_masks([p for p in pictures if p.name == "d.png"], FILES, SMALL)


def test_a_mask_that_the_crop_cuts_off_is_named(tmp_path):
    picture(tmp_path / "a.png", size=(400, 64))
    mask(tmp_path / "a.mask.png", box=(0, 0, 8, 64), size=(400, 64))
    pictures, _ = survey(tmp_path, SMALL)
    with pytest.raises(ValueError, match="a.png has a mask of which nothing is left at"):
        with_own_masks(pictures, FILES, SMALL)


def test_a_folder_of_masks_may_lie_among_the_pictures(folder):
    """Names as those of the pictures, in folders as theirs, of any suffix; its files are no pictures."""
    images, masks = folder / "images", folder / "images" / "holes"
    (images / "in").mkdir()
    picture(images / "in" / "a.png")
    (masks / "in").mkdir(parents=True)
    mask(masks / "in" / "a.png")
    mask(masks / "b.png", size=(64, 48))
    config = MaskConfig(source="files", folder=str(masks))
    pictures, _ = survey(images, SMALL)
    found, left_out = with_own_masks(pictures, config, SMALL)
    assert {p.name: p.mask_path for p in found} == {"b.jpg": masks / "b.png", "in/a.png": masks / "in" / "a.png"}
    assert left_out == {"a.png": "has no mask a.png", "c.png": "has no mask c.png"}
    for wrong, message in ((images, "is that of the pictures"), (folder / "none", "is not there")):
        with pytest.raises(ValueError, match=message):
            with_own_masks(pictures, MaskConfig(source="files", folder=str(wrong)), SMALL)


def clear(path, fill=None, box=(0, 0, 16, 48)):
    """A picture of noise, a part of which is transparent, with one colour under it where ``fill`` is one."""
    values = numpy.random.default_rng(0).integers(0, 255, (48, 64, 4), dtype=numpy.uint8)
    values[..., 3] = 255
    left, top, right, bottom = box
    values[top:bottom, left:right, 3] = 0
    if fill is not None:
        values[top:bottom, left:right, :3] = fill
    Image.fromarray(values).save(path)
    return values


def test_transparent_parts_are_masks_and_the_colours_under_them_are_learnt(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    values = clear(images / "a.png")
    clear(images / "b.png", fill=0)
    picture(images / "c.png")
    assert cache(tmp_path, "alpha") == 0
    dataset, batch = read(tmp_path)
    said = json.loads((tmp_path / "data" / "pictures.json").read_text())
    assert list(said["files"]) == ["a.png"] and said["left_out"]["c.png"] == "has nothing transparent"
    assert "a single colour under its transparent part" in said["left_out"]["b.png"]
    height, width = batch.latents.shape[2:]
    masks = batch.cond.extra["inpaint_mask"]
    assert masks[..., : width // 4].all() and not masks[..., width // 4 + 1 :].any()
    whole = ImageOps.fit(Image.fromarray(values[..., :3]), (8 * width, 8 * height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(numpy.asarray(whole).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        assert (batch.latents - mini.load_autoencoder().encoder(pixels)).abs().max() < 1e-3


# The command


def cache(folder, source: str, out: str = "data", **more) -> int:
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"source": source, **more}.items())
    text = f'[pictures]\nsize = 64\nstep = 16\ncaption = "bag"\nbatch_size = 2\n[masks]\n{lines}'
    (folder / "c.toml").write_text(text)
    return main(["cache", str(folder / "c.toml"), "--images", str(folder / "images"), "--out", str(folder / out)])


def read(folder, out: str = "data"):
    dataset = LatentDataset(folder / out)
    (items,) = dataset.buckets.values()
    return dataset, dataset.read(items)


def test_masks_of_files_become_items(folder, capsys):
    assert cache(folder, "files") == 0
    dataset, batch = read(folder)
    (height, width), masks = batch.latents.shape[2:], batch.cond.extra["inpaint_mask"]
    assert dataset.conditions == ["inpaint_mask", "masked_image"] and len(dataset) == 3
    assert masks.shape == (3, 1, height, width) and dataset.manifest()["masks"] == {"source": "files"}
    quarter = width // 4
    assert masks[..., :quarter].all() and not masks[..., quarter + 1 :].any()
    said = json.loads((folder / "data" / "pictures.json").read_text())
    assert all(file["mask"] for file in said["files"].values())
    # What is hidden is grey before it is encoded; far from the edge nothing else changes.
    image = torch.full((1, 3, 8 * height, 8 * width), 200 / 127.5 - 1)
    image[:, 1:] = 30 / 127.5 - 1
    shown = image.clone()
    shown[..., : 2 * width] = 0
    with torch.no_grad():
        expected = mini.load_autoencoder().encoder(shown)[0]
    assert (batch.cond.extra["masked_image"][0] - expected).abs().max() < 1e-4
    # A mask that is another one now is named.
    mask(folder / "images" / "c.mask.png", box=(0, 0, 32, 48))
    assert cache(folder, "files") == 2
    assert "1 with another mask (c.png)" in capsys.readouterr().err


def test_random_masks_give_every_picture_several_items_that_do_not_depend_on_batches(folder, capsys):
    assert cache(folder, "random", each=3, seed=5) == 0
    assert "times an epoch" not in capsys.readouterr().out  # nine items fill batches of four
    dataset, batch = read(folder)
    assert len(dataset) == 9 and batch.cond.extra["masked_image"].shape == batch.latents.shape
    size = (8 * batch.latents.shape[3], 8 * batch.latents.shape[2])
    # Item i is of picture i mod 3, and the copies of a picture lie together.
    numbers = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    expected = for_latents(random_masks(5, numbers, size, MaskConfig().shares), 8)
    assert torch.equal(batch.cond.extra["inpaint_mask"], expected)
    assert torch.equal(batch.latents[0], batch.latents[2]) and not torch.equal(batch.latents[0], batch.latents[3])
    # One picture's items are held out together, so none of it is trained on.
    learnt, held_out = hold_out(dataset, 1, seed=0)
    assert len(learnt) == 6 and len(held_out) == 3 and held_out.batch(0, 3, 0).same == (0, 0, 0)
    # A stopped command goes on: without its shard the same one is made.
    (shard,) = dataset.paths
    before = shard.read_bytes()
    shard.unlink()
    assert cache(folder, "random", each=3, seed=5) == 0 and shard.read_bytes() == before
    capsys.readouterr()
    assert cache(folder, "random", each=3, seed=6) == 2
    assert "[masks] seed is 6 now, was 5" in capsys.readouterr().err
    assert cache(folder, "none") == 2 and "[masks] " in capsys.readouterr().err


def test_masks_need_pictures(folder, capsys):
    (folder / "c.toml").write_text('[masks]\nsource = "random"\n')
    assert main(["cache", str(folder / "c.toml"), "--out", str(folder / "data")]) == 2
    assert "masks are of own pictures: give --images FOLDER" in capsys.readouterr().err
