"""Inpainting in the real server: masks in Picture Folder, a student of a tiny nine-channel checkpoint, and its fill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import node
from PIL import Image, ImageOps
from run_files import fails, log_of, lora_of, run_folder
from safetensors.torch import load_file, save_file
from server import run_probe
from test_datasets import folder_of

from distill_core.data.dataset import LatentDataset
from distill_core.data.masks import for_latents
from distill_core.data.random_masks import SHARES, random_masks
from distill_core.diffusion.noise import ItemNoise
from distill_core.lora_files import read_lora

SIDE = 64
NUMBERS = dict(width=768, tokens=77, pooled=0)


@pytest.fixture(scope="module")
def checkpoint(host, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("inpainting")
    run_probe("tiny_inpainting.py", folder)
    return host.add_model("checkpoints", folder / "inpainting.safetensors")


@pytest.fixture(scope="module")
def pictures(host):
    """Six pictures of noise in input/holes, of which two have a transparent part, and masks in input/holes masks."""
    folder, masks, generator = host.base_dir / "input" / "holes", host.base_dir / "input" / "holes masks", np.random
    for path in (folder, masks):
        path.mkdir(parents=True)
    rng = generator.default_rng(0)
    for number in range(6):
        values = rng.integers(0, 255, (SIDE, SIDE, 4), dtype=np.uint8)
        values[..., 3] = 255
        if number < 2:
            values[: SIDE // 2, :16, 3] = 0
        Image.fromarray(values).save(folder / f"{number}.png")
    for number in range(4):
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(255 if number else 0, (0, 0, SIDE, 16))
        mask.save(masks / f"{number}.webp", lossless=True)
    return folder


@pytest.fixture(scope="module")
def graph(host, checkpoint, pictures):
    """graph(name, **changes) -> the checkpoint, its "clip" and Picture Folder; None: not connected."""

    def make(name: str, **changes) -> dict:
        settings = dict(
            model=["checkpoint", 0],
            vae=["checkpoint", 2],
            clip=["clip", 0],
            folder="holes",
            dataset_name=name,
            size=SIDE,
            step=16,
            dtype="float32",
            masks="random",
        )
        return {
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
            "clip": node("TestRandomClip", **NUMBERS),
            "dataset": node("TurboDistillPictureFolder", **{k: v for k, v in (settings | changes).items() if v}),
        }

    return make


def items(host, name: str):
    dataset = LatentDataset(folder_of(host, name))
    (bucket,) = dataset.buckets.values()
    return dataset.read(bucket)


def said(entry: dict) -> str:
    return "".join(entry["outputs"]["dataset"]["text"])


@pytest.mark.parametrize("widgets", [{}, {"mask_shares": "discs 1, full 0", "masks_each": 3, "mask_seed": 5}])
def test_random_masks_are_those_of_the_command(host, graph, widgets):
    name = f"random{len(widgets)}"
    text = said(host.run(graph(name, **widgets), 120))
    each, batch = widgets.get("masks_each", 1), items(host, name)
    assert f"random masks: {each} for each picture, so {6 * each} items" in text
    shares = {"discs": 1.0} if widgets else SHARES
    numbers = [picture + 6 * copy for picture in range(6) for copy in range(each)]
    expected = for_latents(random_masks(widgets.get("mask_seed", 0), numbers, (SIDE, SIDE), shares), 8)
    assert torch.equal(batch.cond.extra["inpaint_mask"], expected)
    assert batch.cond.extra["masked_image"].shape == batch.latents.shape == (6 * each, 4, SIDE // 8, SIDE // 8)


def test_own_masks_come_from_a_folder_and_those_that_are_none_are_named(host, graph):
    text = said(host.run(graph("own", masks="files", mask_folder="holes masks"), 120))
    assert "0.png (has a mask with nothing to fill (white))" in text
    assert "4.png (has no mask 4.png)" in text and "masks: your own" in text
    masks = items(host, "own").cond.extra["inpaint_mask"]
    assert len(masks) == 3 and masks[..., :2, :].all() and not masks[..., 2:, :].any()


def test_transparent_parts_are_masks(host, graph, pictures):
    text = said(host.run(graph("alpha", masks="alpha"), 120))
    assert "2.png (has nothing transparent)" in text
    batch = items(host, "alpha")
    masks = batch.cond.extra["inpaint_mask"]
    assert len(masks) == 2 and masks[..., :4, :2].all() and masks.sum() == 2 * 8
    # The picture below is what is learnt, as core's own node encodes it; what is hidden is grey.
    solid = Image.open(pictures / "0.png").convert("RGB")
    solid.save(host.base_dir / "input" / "solid.png")
    mask = ImageOps.invert(Image.open(pictures / "0.png").getchannel("A"))
    mask.convert("RGB").save(host.base_dir / "input" / "solid_mask.png")
    shown = graph("alpha", masks="alpha") | fill_nodes("solid.png", "solid_mask.png")
    shown |= {"save": node("SaveLatent", samples=["fill", 2], filename_prefix="solid")}
    latent = saved_latent(host, host.run(shown, 120), "save") * 0.18215
    assert (batch.latents[0] - latent[0]).abs().max() < 1e-3 * latent.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(masks="none"), "this model fills what a mask hides: set masks to random, or to files or alpha"),
        (dict(masks="files", masks_each=2), "masks_each 2 needs masks = random"),
        (dict(mask_folder="holes masks"), "mask_folder is for masks = files"),
        (dict(mask_shares="circles 1"), "mask_shares: 'circles 1' is no kind of mask and its share"),
        (dict(mask_shares="full 0"), "mask_shares: give one of strokes, discs"),
        (dict(masks="files", mask_folder="holes"), "is that of the pictures"),
        (dict(masks="files"), "no picture has a mask (files): 0.png has no mask 0.mask.png"),
    ],
)
def test_mistakes_are_explained(host, graph, change, message):
    assert message in fails(host, graph("mistake", **change))
    assert not (folder_of(host, "mistake") / "dataset.json").exists()


def test_another_seed_is_named_by_its_widget(host, graph):
    host.run(graph("named"), 120)
    assert "mask_seed is 1 now, was 0" in fails(host, graph("named", mask_seed=1))


# A student


def training(graph, name: str, **trainer) -> dict:
    settings = dict(
        model=["checkpoint", 0],
        dataset=["dataset", 0],
        vae=["checkpoint", 2],
        run_name=name,
        target_steps=1,
        steps=2,
        batch_size=2,
        rank=4,
        student_lr=1e-2,
        pairs_weight=0.0,
        distillation_weight=2.5,
        teacher_cfg=2.0,
        preview_every=1,
        settings=["any", 0],
    )
    return graph("trained", masks_each=2) | {
        "any": node("TurboDistillTrainingSettings", preflight=False),  # the weights are random
        "train": node("TurboDistillLADDTrainer", **(settings | trainer)),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{name}"),
    }


@pytest.fixture(scope="module")
def trained(host, graph) -> str:
    """What the server printed meanwhile."""
    before = len(host.log())
    host.run(training(graph, "inpaint"), 300)
    return host.log()[before:]


def test_a_student_is_trained_and_its_lora_loads_in_core(host, trained):
    assert [entry["step"] for entry in log_of(host, "inpaint")] == [1, 2]
    assert all("distillation" in entry for entry in log_of(host, "inpaint"))
    state, description = read_lora(lora_of(host, "inpaint"))
    assert state and description["steps"] == 2 and description["family"] == "sd15"
    assert "lora key not loaded" not in trained


def test_previews_and_report_fill_the_holes_of_the_dataset(host, trained):
    """Two rows in a preview: what is to be filled, and the student. The report has the teacher's, too."""
    previews = sorted((run_folder(host, "inpaint") / "samples").glob("*.jpg"))
    assert [path.name for path in previews] == ["step000001.jpg", "step000002.jpg"]
    with Image.open(previews[-1]) as picture:
        assert picture.height == 6 + 2 * 132 and picture.width == 170 + 2 * 132
    kept = load_file(run_folder(host, "inpaint") / "items.safetensors")
    assert kept["extra.inpaint_mask"].shape == (2, 1, 8, 8) and kept["latents"].shape == (2, 4, 8, 8)
    with Image.open(run_folder(host, "inpaint") / "report.png") as picture:
        cells = np.asarray(picture.convert("RGB"), dtype=float)[-(4 * 132) :]
    # From the top: what is to be filled, the teacher at 1 and at 25 steps, the student; two pictures in each.
    for row in range(4):
        for column in range(2):
            cell = cells[row * 132 : row * 132 + 128, 170 + column * 132 : 298 + column * 132]
            assert cell.shape == (128, 128, 3) and cell.std() > 1
    assert (cells[:, 434:] == 255).all() and (cells[128:132, 170:] == 255).all()


def test_text_alone_makes_no_dataset_of_an_inpainting_model(host, graph):
    wrong = graph("plain")
    wrong["texts"] = node("TestRandomConditioning", count=2, seed=1, **NUMBERS)
    wrong["latents"] = node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=2)
    shared = dict(model=["checkpoint", 0], positive=["texts", 0], dataset_name="plain")
    for maker in (
        node("TurboDistillLatentsDataset", latents=["latents", 0], **shared),
        node("TurboDistillTeacherLatents", count=2, sizes=f"{SIDE}x{SIDE}", steps=1, cfg=1.0, **shared),
    ):
        text = fails(host, wrong | {"dataset": maker})
        assert "takes inpaint_mask and masked_image of every picture, and these conditionings are text alone" in text
    assert not folder_of(host, "plain").exists()


# Sampling


def fill_nodes(image: str, mask: str) -> dict:
    """Core's own nodes for inpainting."""
    return {
        "text": node("TestRandomConditioning", count=1, seed=3, **NUMBERS),
        "none": node("TestRandomConditioning", count=1, seed=4, **NUMBERS),
        "image": node("LoadImage", image=image),
        "mask image": node("LoadImage", image=mask),
        "mask": node("ImageToMask", image=["mask image", 0], channel="red"),
        "fill": node(
            "InpaintModelConditioning",
            positive=["text", 0],
            negative=["none", 0],
            vae=["checkpoint", 2],
            pixels=["image", 0],
            mask=["mask", 0],
            noise_mask=True,
        ),
    }


def saved_latent(host, entry: dict, key: str) -> torch.Tensor:
    (file,) = entry["outputs"][key]["latents"]
    return load_file(host.base_dir / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


@pytest.fixture(scope="module")
def hole(host):
    """A picture and a mask of its left upper part, off the grid of the latent."""
    rng, folder = np.random.default_rng(3), host.base_dir / "input"
    Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "whole.png")
    mask = Image.new("RGB", (SIDE, SIDE))
    mask.paste((255, 255, 255), (0, 0, 37, 29))
    mask.save(folder / "hole.png")
    return fill_nodes("whole.png", "hole.png")


def test_turbo_sampler_gives_what_cores_sampler_gives_at_the_same_levels(host, graph, trained, hole):
    """Both after InpaintModelConditioning, Euler at the same levels with guidance, from the same noise."""
    noise = {
        "latent_tensor": ItemNoise(5, [0]).normal(4, SIDE // 8, SIDE // 8),
        "latent_format_version_0": torch.ones(0),
    }
    save_file(noise, host.base_dir / "input" / "noise.latent")
    shared = dict(latent_image=["fill", 2], sigmas=["levels", 0])
    told = dict(model=["lora", 0], positive=["fill", 0], negative=["fill", 1], cfg=2.0)
    turbo = dict(preset="auto", steps=0, denoise=1.0, denoise_mode="snap", seed=5, sampler="euler")
    nodes = graph("trained", masks_each=2) | hole
    nodes |= {
        "lora": node("LoraLoaderModelOnly", model=["checkpoint", 0], lora_name=lora_name(host), strength_model=1.0),
        "levels": node("BasicScheduler", model=["checkpoint", 0], scheduler="simple", steps=3, denoise=1.0),
        "ours": node("TurboDistillSampler", **shared, **told, **turbo),
        "drawn": node("LoadLatent", latent="noise.latent"),
        "noise": node("TestGivenNoise", latent=["drawn", 0]),
        "guider": node("CFGGuider", **told),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "theirs": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0], **shared
        ),
        "save original": node("SaveLatent", samples=["fill", 2], filename_prefix="original"),
        **{f"save {who}": node("SaveLatent", samples=[who, 0], filename_prefix=who) for who in ("ours", "theirs")},
        "decode": node("VAEDecode", samples=["ours", 0], vae=["checkpoint", 2]),
        "paste": node(
            "ImageCompositeMasked",
            destination=["image", 0],
            source=["decode", 0],
            mask=["mask", 0],
            x=0,
            y=0,
            resize_source=False,
        ),
        "save": node("SaveImage", images=["paste", 0], filename_prefix="pasted"),
    }
    entry = host.run(nodes, 120)
    original, ours, theirs = (saved_latent(host, entry, f"save {who}") for who in ("original", "ours", "theirs"))
    outside = torch.ones_like(original, dtype=torch.bool)
    outside[..., :5, :6] = False
    assert torch.equal(ours[outside], original[outside]) and (ours - original)[~outside].abs().max() > 1e-2
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    (file,) = entry["outputs"]["save"]["images"]
    pasted = np.asarray(Image.open(host.base_dir / "output" / file["filename"]).convert("RGB"))
    changed = (pasted != np.asarray(Image.open(host.base_dir / "input" / "whole.png"))).any(-1)
    assert changed[:29, :37].any() and not changed[29:].any() and not changed[:, 37:].any()


def lora_name(host) -> str:
    (file,) = (host.base_dir / "output" / "loras").glob("inpaint_*.safetensors")
    return file.name
