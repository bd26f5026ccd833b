"""Own pictures of every kind that people have in their folders."""

from __future__ import annotations

import io
import json
import os

import numpy
import pytest
import torch
from PIL import Image

from distill_core.cli.main import main
from distill_core.data.buckets import repeats
from distill_core.data.dataset import LatentDataset
from distill_core.data.pictures import (
    PictureConfig,
    bucket_of,
    bucket_sizes,
    caption_of,
    cropped_share,
    find,
    open_picture,
    read_into,
    survey,
)
from distill_core.models import mini

CONFIG = "[pictures]\nsize = 64\nstep = 16\n[train]\nbatch_size = 4\nsteps = 2\nwarmup_steps = 1\n"
RED, GREEN = (200, 30, 30), (20, 160, 40)


def halves(width=64, height=64, left=RED, right=GREEN, mode="RGB") -> Image.Image:
    image = Image.new(mode, (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def pixel(path, at, background="white"):
    return open_picture(path, background).getpixel(at)


def close(a, b, most=6) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= most


@pytest.mark.case("training 2a EXIF", "a picture is turned as its EXIF says")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation, kind):
    upright = halves(48, 32)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that stores it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif, **({"quality": 95} if kind == "jpg" else {}))
    image = open_picture(tmp_path / f"a.{kind}", "white")
    assert image.size == (48, 32)
    assert close(image.getpixel((8, 16)), RED, 12) and close(image.getpixel((40, 16)), GREEN, 12)


@pytest.mark.case("training 2a alpha", "transparent pixels show the background, not what is hidden under them")
@pytest.mark.parametrize(("background", "seen"), [("white", 255), ("gray", 128), ("black", 0)])
def test_transparent_parts_show_the_background(tmp_path, background, seen):
    image = halves().convert("RGBA")
    image.putalpha(Image.fromarray(numpy.repeat(numpy.array([[255] * 32 + [0] * 32], numpy.uint8), 64, 0)))
    image.save(tmp_path / "a.png")
    image.convert("LA").save(tmp_path / "la.png")
    image.quantize(8).save(tmp_path / "p.png")
    assert pixel(tmp_path / "a.png", (10, 10), background) == RED
    for name in ("a.png", "la.png", "p.png"):
        assert close(pixel(tmp_path / name, (50, 10), background), (seen,) * 3), name


@pytest.mark.case("training 2a 16 bit", "16-bit grey keeps its levels")
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bit_grey_keeps_its_levels(tmp_path, kind):
    values = numpy.repeat(numpy.linspace(0, 65535, 64)[None], 64, 0).astype(numpy.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    read = numpy.asarray(open_picture(tmp_path / f"a.{kind}", "white"))[..., 0].astype(float)
    assert abs(read - values / 257).max() <= 0.5


@pytest.mark.case("training 2a modes", "grey, palette, CMYK, one bit and animated pictures are read in their colours")
def test_other_kinds_of_pictures_are_read_in_their_colours(tmp_path):
    halves().convert("L").save(tmp_path / "grey.png")
    halves().quantize(4).save(tmp_path / "palette.png")
    halves().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    halves().convert("1").save(tmp_path / "bit.png")
    halves().save(tmp_path / "moving.webp", save_all=True, append_images=[halves(left=GREEN)], lossless=True)
    halves().save(tmp_path / "wrong.png", format="JPEG", quality=95)
    for name in ("palette.png", "cmyk.jpg", "moving.webp", "wrong.png"):
        assert close(pixel(tmp_path / name, (10, 30)), RED, 12) and close(pixel(tmp_path / name, (55, 30)), GREEN, 12)
    grey = pixel(tmp_path / "grey.png", (10, 30))
    assert len({*grey}) == 1 and open_picture(tmp_path / "bit.png", "white").mode == "RGB"


def test_floating_point_and_32_bit_pixels_are_named(tmp_path):
    Image.fromarray(numpy.ones((32, 32), numpy.float32)).save(tmp_path / "f.tif")
    Image.fromarray(numpy.full((32, 32), 10**6, numpy.int32)).save(tmp_path / "i.tif")
    halves().save(tmp_path / "good.png")
    _, left_out = survey(tmp_path, PictureConfig())
    assert "floating-point pixels" in left_out["f.tif"] and "32-bit pixels" in left_out["i.tif"]


@pytest.mark.case("training 13", "a broken picture is left out and named, and the others are used")
def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    halves().save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:5000])
    halves(8, 300).save(tmp_path / "thin.png")
    (tmp_path / "phone.HEIC").write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    pictures, left_out = survey(tmp_path, PictureConfig())
    assert [picture.name for picture in pictures] == ["good.png"]
    assert left_out.keys() == {"empty.png", "text.jpg", "cut.png", "thin.png", "phone.HEIC", "gone.png", "circle.png"}
    assert "truncated" in left_out["cut.png"] and left_out["empty.png"] == "empty"
    assert "8 x 300 pixels" in left_out["thin.png"] and "save it as PNG or JPEG" in left_out["phone.HEIC"]
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="holds no picture that can be read: .*cut.png .*truncated"):
        survey(tmp_path, PictureConfig())


def test_a_huge_picture_is_read_without_a_warning_and_a_larger_one_named(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    halves(120, 120).save(tmp_path / "huge.png")
    halves(200, 200).save(tmp_path / "larger.png")
    (picture,), left_out = survey(tmp_path, PictureConfig())
    assert read_into(picture, (64, 64), "white").shape == (3, 64, 64) and not recwarn.list
    assert "million pixels: save it smaller" in left_out["larger.png"] and "larger.png" not in picture.name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_no_picture_and_any_name_can_be_printed(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    halves().save(tmp_path / "good.png")
    try:
        os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:  # a disk whose names are Unicode
        pass
    (picture,), left_out = survey(tmp_path, PictureConfig())
    assert left_out == {"pipe.png": "not a file, but a device or a pipe"} and picture.name.encode()


def test_hidden_and_linked_files_count_as_people_expect(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for place in (root / "sub", root / ".hidden", root / "__MACOSX", other):
        place.mkdir(parents=True)
    for path in (root / "b.png", root / "sub" / "ü 1.PNG", other / "c.webp"):
        halves().save(path)
    for path in (root / ".a.png", root / ".hidden" / "d.png", root / "__MACOSX" / "e.png", root / "._b.png"):
        halves().save(path)
    (root / "notes.md").write_text("x")
    for name, said in (("run", "log.jsonl"), ("data", "dataset.json")):
        (root / name / "samples").mkdir(parents=True)
        (root / name / said).touch()
        halves().save(root / name / "samples" / "step000001.jpg")
    (root / "linked").symlink_to(other)
    (root / "linked too").symlink_to(other)
    (root / "sub" / "up").symlink_to(root)
    (root / "z.png").symlink_to(root / "b.png")
    assert list(find(root)) == ["b.png", "linked/c.webp", "sub/ü 1.PNG"]
    with pytest.raises(ValueError, match="is not a folder; give the folder that the pictures are in"):
        find(root / "b.png")


@pytest.mark.case("training D11", "captions are UTF-8 with or without a byte order mark; another encoding is named")
def test_captions_are_the_text_beside_a_picture(tmp_path):
    for name, raw in {"a": b"\xef\xbb\xbfa fox\r\n", "b": "ein Füchs\nim Schnee".encode(), "c": b" \n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(raw)
    assert [caption_of(tmp_path / f"{name}.png") for name in "abcd"] == ["a fox", "ein Füchs im Schnee", "", ""]
    (tmp_path / "f.TXT").write_text("from a camera")
    assert caption_of(tmp_path / "f.png") == "from a camera"
    (tmp_path / "e.txt").write_bytes("Füchs".encode("latin-1"))
    halves().save(tmp_path / "e.png")
    with pytest.raises(ValueError, match="e.txt is not UTF-8 text"):
        survey(tmp_path, PictureConfig())


@pytest.mark.parametrize(("size", "step"), [(1024, 64), (512, 64), (64, 16), (768, 32)])
def test_sizes_are_multiples_with_as_many_pixels_as_asked(size, step):
    config = PictureConfig(size=size, step=step)
    sizes = bucket_sizes(config)
    assert (size, size) in sizes and {(h, w) for w, h in sizes} == set(sizes)
    for w, h in sizes:
        assert w % step == 0 == h % step and w * h <= size**2 and max(w, h) <= 2 * min(w, h)
    assert all(w * h >= 0.7 * size**2 for w, h in sizes) or step == 16


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((3000, 3000), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((6000, 4000), (1216, 832)),
        ((4096, 64), (1408, 704)),
        ((100, 100), (1024, 1024)),
    ],
)
def test_a_picture_goes_where_its_shape_is(size, bucket):
    assert bucket_of(size, bucket_sizes(PictureConfig())) == bucket


def test_what_is_cropped_is_a_share_of_the_picture(tmp_path):
    assert cropped_share((2000, 1000), (64, 64)) == pytest.approx(0.5)
    assert cropped_share((640, 640), (64, 64)) == pytest.approx(0)
    halves(200, 100).save(tmp_path / "a.png")
    (picture,), _ = survey(tmp_path, PictureConfig())
    image = read_into(picture, (64, 64), "white")
    assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1
    assert close(((image[:, 30, 5] + 1) * 127.5).tolist(), RED) and close(
        ((image[:, 30, 60] + 1) * 127.5).tolist(), GREEN
    )
    assert (repeats(1, 4), repeats(3, 4), repeats(9, 4)) == (4, pytest.approx(4 / 3), 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"step": 24}, "multiple of 16"), ({"size": 16}, "smaller than step"), ({"background": "red"}, "one of white")],
)
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        PictureConfig(**bad)


# The command


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in three shapes, two of them without a caption."""
    images = tmp_path / "images"
    images.mkdir()
    sizes = [(64, 64), (200, 200), (64, 64), (96, 48), (120, 60), (48, 90), (32, 32)]
    for number, (width, height) in enumerate(sizes):
        halves(width, height, (20 * number, 30, 30)).save(images / f"{number}.png")
        if number < 5:
            (images / f"{number}.txt").write_text(mini.CLASS_NAMES[number] + "\n")
    (images / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "c.toml").write_text(CONFIG + "[model]\nlora_rank = 2\n")
    return tmp_path


def cache(folder, *more, config="c.toml", out="data") -> int:
    return main(["cache", str(folder / config), "--images", str(folder / "images"), "--out", str(folder / out), *more])


def with_pictures(folder, **changes) -> None:
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in changes.items())
    (folder / "c.toml").write_text(CONFIG.replace("step = 16\n", f"step = 16\n{lines}") + "[model]\nlora_rank = 2\n")


@pytest.mark.case("training L5", "a folder of own pictures becomes a dataset on the command line, and trains")
def test_a_folder_of_pictures_becomes_a_dataset_that_trains(folder, capsys):
    with_pictures(folder, caption="bag")
    assert cache(folder) == 0
    said = capsys.readouterr().out
    assert "7 pictures in 3 sizes" in said and "64x64: 4" in said and "left out: bad.png (" in said
    assert "80x48: 2, each comes 2 times an epoch at batch_size 4, cropped 17%, at most 17%" in said
    assert "48x80: 1, each comes 4 times an epoch at batch_size 4" in said and "1 scaled up" in said
    dataset = LatentDataset(folder / "data")
    assert len(dataset) == 7 and sorted(dataset.shapes) == [(16, 6, 10), (16, 8, 8), (16, 10, 6)]
    kept = json.loads((folder / "data" / "pictures.json").read_text())
    assert kept["left_out"].keys() == {"bad.png"} and kept["files"]["6.png"]["caption"] == "bag"
    assert sum(row["pictures"] for row in kept["buckets"]) == 7
    # The latents are those of the autoencoder, in the model's units.
    source = mini.load_autoencoder()
    image = read_into(survey(folder / "images", PictureConfig(size=64, step=16))[0][0], (64, 64), "white")
    with torch.no_grad():
        latent = source.encoder(image[None])[0]
    square = dataset.read(next(items for bucket, items in dataset.buckets.items() if bucket[:3] == (16, 8, 8)))
    assert min((row - latent).abs().max() for row in square.latents) < 1e-4
    train = ["train", str(folder / "c.toml"), "--data", str(folder / "data"), "--out", str(folder / "run")]
    assert main([*train, "--no-preflight"]) == 0  # which rightly doubts pictures as flat as these


def test_it_goes_on_and_ends_the_same(folder):
    with_pictures(folder, caption="bag", batch_size=2)
    assert cache(folder) == 0 and cache(folder, out="again") == 0
    whole = {path.name: path.read_bytes() for path in (folder / "data").glob("[!.]*")}
    shard = folder / "again" / "shard-00001.safetensors"
    shard.unlink()
    assert cache(folder, out="again") == 0
    assert {path.name: path.read_bytes() for path in (folder / "again").glob("[!.]*")} == whole


def test_a_refusal_names_the_pictures_and_keys_that_differ(folder, capsys):
    with_pictures(folder, caption="bag")
    assert cache(folder) == 0
    halves(left=GREEN).save(folder / "images" / "new.png")
    (folder / "images" / "1.txt").write_text("coat")
    os.remove(folder / "images" / "0.png")
    with_pictures(folder, caption="bag", background="black")
    capsys.readouterr()
    assert cache(folder) == 2
    said = capsys.readouterr().err
    assert (
        "1 added (new.png); 1 gone (0.png); 1 with another caption (1.png); [pictures] background is black now" in said
    )
    assert "choose another --out, or delete it to make it anew" in said


@pytest.mark.case("training 2b", "a picture dataset does not depend on the model's precision or its LoRAs")
def test_the_model_s_precision_does_not_matter(folder):
    with_pictures(folder, caption="bag")
    assert cache(folder) == 0
    (folder / "c.toml").write_text((folder / "c.toml").read_text() + 'dtype = "bfloat16"\n')
    assert cache(folder) == 0


def test_a_folder_that_is_not_there_is_named(folder, capsys):
    assert main(["cache", str(folder / "c.toml"), "--images", str(folder / "x"), "--out", str(folder / "d")]) == 2
    assert "x is not a folder; give the folder that the pictures are in" in capsys.readouterr().err


def test_pictures_are_told_from_samples_where_pairs_are_needed(folder, capsys):
    with_pictures(folder, caption="bag")
    assert cache(folder) == 0
    for method, section in (("diffusion2gan", ""), ("ladd", "[ladd]\nterms = { adversarial = 1.0, pairs = 1.0 }\n")):
        (folder / "t.toml").write_text(f'method = "{method}"\n[model]\nlora_rank = 2\n{section}')
        capsys.readouterr()
        assert main(["train", *map(str, (folder / "t.toml", "--data", folder / "data", "--out", folder / "run"))]) == 2
        said = capsys.readouterr().err
        assert "pictures have no pairs" in said or "set the weight of the pairs to 0 for pictures" in said


def test_a_picture_without_a_caption_is_told_where_the_model_needs_one(folder, capsys):
    assert cache(folder) == 2
    said = capsys.readouterr()
    assert "without a caption: 2 (5.png, 6.png)" in said.out and "ankle boot; not an empty text" in said.err
