"""The scenes models that fill and edit pictures, through ComfyUI's own nodes: same numbers as headless."""

from __future__ import annotations

import pytest
import torch
from graphs import node
from run_files import fails, log_of
from safetensors.torch import load_file, save_file
from server import run_probe
from test_datasets import folder_of

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import ItemConds, LatentDataset
from distill_core.data.masks import for_latents, hidden
from distill_core.data.pictures import read_file_into
from distill_core.data.random_masks import SHARES, random_masks
from distill_core.data.scenes import draw_edits, draw_rows, render
from distill_core.diffusion.noise import ItemNoise
from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser
from distill_core.models.guidance import guided
from distill_core.models.items import IMAGE_STRENGTH, MASK, MASKED_IMAGE, SOURCE_IMAGE, TEXT_STRENGTH

ROWS = range(3)
TAKES = {scenes.INPAINTING: f"{MASK} {MASKED_IMAGE}", scenes.EDITING: SOURCE_IMAGE}


@pytest.fixture(scope="module", params=TAKES)
def probe(request, tmp_path_factory):
    """(kind, the host's outputs, ours with what they are told and without, what the host printed)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    before, after = draw_edits(0, ROWS)
    pictures = render(before, draw_rows(0, ROWS))[0]
    masks = random_masks(0, ROWS, (scenes.SIZE, scenes.SIZE), SHARES)
    text = scenes.encode_text([scenes.caption(words) for words in after.tolist()])
    x, sigma = ItemNoise(0, ROWS).normal(*scenes.LATENT_SHAPE), torch.tensor([1.0, 0.75, 0.3])
    encode = scenes.load_autoencoder().encoder
    grey = encode(torch.zeros_like(pictures))
    told = {MASK: for_latents(masks, scenes.PIXELS), MASKED_IMAGE: encode(hidden(pictures, masks))}
    untold = {MASK: torch.ones(3, 1, 8, 8), MASKED_IMAGE: grey}
    if kind == scenes.EDITING:
        told, untold = {SOURCE_IMAGE: encode(pictures)}, {SOURCE_IMAGE: torch.zeros_like(grey)}
    backend = scenes.scenes_backend(kind=kind)
    with torch.no_grad():
        ours = [Denoiser(backend)(x, sigma, text.with_items(items)) for items in (told, untold)]
    given = {"x": x, "sigma": sigma, "context": text.context, "pooled": text.pooled, "masks": masks[:, 0]}
    given["pictures"] = (pictures.permute(0, 2, 3, 1) + 1) / 2
    save_file({name: value.contiguous() for name, value in given.items()}, folder / "in.safetensors")
    (folder / "kind").write_text(kind)
    printed = run_probe("probe_scenes.py", folder)
    return kind, load_file(folder / "out.safetensors"), dict(zip(("told", "untold"), ours, strict=True)), printed


@pytest.mark.parametrize("name", ["told", "untold"])
def test_the_host_computes_what_the_network_was_trained_to(probe, name):
    """Also without a picture: nothing is known of it, as where all is hidden or there is none to edit."""
    _, host, ours, _ = probe
    assert (host[name] - ours[name]).norm() < 1e-4 * ours[name].norm()


def test_the_picture_matters(probe):
    _, host, _, _ = probe
    assert (host["told"] - host["untold"]).norm() > 1e-2 * host["told"].norm()


def test_the_trainers_see_the_same_model(probe):
    """On what the nodes for such models write into a conditioning."""
    kind, host, ours, printed = probe
    assert f"takes: {TAKES[kind]}\n" in printed
    assert (host["trained"] - ours["told"]).norm() < 1e-4 * ours["told"].norm()


# In the graph

EDITED, SOURCES = "edited scenes (shipped)", "scenes before they were edited (shipped)"


def pictures(kind: str, **changes) -> dict:
    """The model of a kind, and a dataset of the shipped edits."""
    own = {"source_folder": SOURCES} if kind == scenes.EDITING else {"masks": "random", "masks_each": 4}
    settings = dict(folder=EDITED, dataset_name=f"{kind}_pictures", size=64, step=16, dtype="float32", **own)
    wired = dict(model=["scenes", 0], vae=["scenes", 1], clip=["scenes", 2])
    return {
        "scenes": node("TurboDistillLoadScenesModel", kind=kind),
        "pictures": node("TurboDistillPictureFolder", **wired, **(settings | changes)),
    }


def edits(**changes) -> dict:
    """What the teacher makes of the shipped sources."""
    strengths = dict(text_strength_low=1.0, text_strength_high=4.0, image_strength_low=1.0, image_strength_high=2.0)
    settings = dict(dataset_name="edits", count=30, steps=4, pairs_for_steps=1, batch_size=30, dtype="float32")
    made = dict(model=["scenes", 0], pairs=["pictures", 0]) | settings | strengths | changes
    return pictures(scenes.EDITING) | {"edits": node("TurboDistillTeacherEdits", **made)}


def training(graph: dict, dataset: str, name: str, **trainer) -> dict:
    settings = dict(target_steps=1, steps=3, batch_size=4, rank=4, gradient_checkpointing=False)
    wired = dict(model=["scenes", 0], vae=["scenes", 1], dataset=[dataset, 0], run_name=name)
    return graph | {
        "train": node("TurboDistillLADDTrainer", **wired, **(settings | trainer)),
        "save": node("TurboDistillSaveLora", lora=["train", 1], filename_prefix=f"loras/{name}"),
    }


def test_a_folder_of_sources_makes_pairs(host):
    said = "".join(host.run(pictures(scenes.EDITING), 120)["outputs"]["pictures"]["text"])
    assert "12 pictures in 1 size" in said and "each with its source: 12 pairs" in said
    dataset = LatentDataset(folder_of(host, "editing_pictures"))
    batch = dataset.read(dataset.largest)
    encode = scenes.load_autoencoder().encoder
    for folder, latents in (("edited", batch.latents), ("sources", batch.cond.extra[SOURCE_IMAGE])):
        files = sorted((scenes.ASSETS.parent / folder).glob("*.png"))
        shown = torch.stack([read_file_into(file, (64, 64), None) for file in files])
        torch.testing.assert_close(latents, encode(shown), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (pictures(scenes.EDITING, source_folder="none"), "choose the folder of the pictures before in source_folder"),
        (pictures(scenes.EDITING, masks="random"), "edits pictures and takes no masks"),
        (pictures(scenes.INPAINTING, source_folder=SOURCES), "sources are for models that edit"),
        (pictures(scenes.INPAINTING, masks="none", masks_each=1), "this model fills what a mask hides"),
        (edits() | {"scenes": node("TurboDistillLoadScenesModel", kind="text")}, "sources are for models that edit"),
    ],
)
def test_pictures_that_do_not_fit_the_model_are_refused(host, graph, message):
    assert message in fails(host, graph)


def test_the_teacher_edits_as_the_command_has_it(host, tmp_path):
    """The same noise, strengths and guidance of text and picture."""
    host.run(edits(), 120)
    made = LatentDataset(folder_of(host, "edits"))
    pairs = LatentDataset(folder_of(host, "editing_pictures"))
    spread = dict(text_strength=(1.0, 4.0), image_strength=(1.0, 2.0), guidance=2.5)
    config = CacheConfig(count=30, steps=4, sizes=((8, 8),), state_sigmas=(1.0,), batch_size=30, **spread)
    teacher = guided(Denoiser(scenes.scenes_backend(kind=scenes.EDITING)), pairs.uncond(), config.guidance)
    for _ in cache_latents(teacher, ItemConds(pairs, pairs.largest), 16, config, tmp_path):
        pass
    expected = LatentDataset(tmp_path)
    ours, theirs = made.read(made.largest), expected.read(expected.largest)
    assert made.manifest()["config"] == expected.manifest()["config"]
    for name in (TEXT_STRENGTH, IMAGE_STRENGTH):
        assert torch.equal(ours.cond.extra[name], theirs.cond.extra[name])
    assert (ours.latents - theirs.latents).norm() < 1e-4 * theirs.latents.norm()
    assert torch.equal(ours.states[:, 0], theirs.states[:, 0])


def test_a_student_that_fills_is_trained_on_pictures(host):
    graph = training(pictures(scenes.INPAINTING), "pictures", "fills", distillation_weight=2.5, teacher_cfg=2.0)
    host.run(graph, 240)
    assert {"adversarial", "distillation"} <= log_of(host, "fills")[-1].keys()


def test_a_student_is_told_strengths_which_a_node_turns(host):
    told = dict(strengths_told=True, usual_text_strength=2.0, usual_image_strength=1.5, student_lr=1e-2)
    graph = training(edits(), "edits", "edits_told", **told)
    del graph["save"]  # before any file is where LoRAs are
    sampling = dict(seed=3, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    told = dict(positive=["text", 0], negative=["text", 0], vae=["scenes", 1], pixels=["grey", 0])
    graph |= {
        "turned": node("TurboDistillEditingStrengths", model=["train", 0], text_strength=3.0, image_strength=0.0),
        "text": node("TurboDistillScenesConditioning", prompts="plain red star on waves", all_prompts=False),
        "grey": node("EmptyImage", width=64, height=64, batch_size=1, color=8421504),
        "told": node("InstructPixToPixConditioning", **told),
    }
    for name, model in (("plain", ["train", 0]), ("other", ["turned", 0])):
        wired = dict(model=model, positive=["told", 0], negative=["told", 1], latent_image=["told", 2])
        graph[f"sample {name}"] = node("KSampler", **wired, **sampling)
        graph[name] = node("SaveLatent", samples=[f"sample {name}", 0], filename_prefix=name)
    outputs = host.run(graph, 240)["outputs"]
    assert "pairs" in log_of(host, "edits_told")[-1]
    said = "".join(outputs["turned"]["text"])
    assert (
        "text_strength 3 (trained from 1 to 4, 2 where it is not told)" in said and "1.5 where it is not told" in said
    )
    made = []
    for name in ("plain", "other"):
        (file,) = outputs[name]["latents"]
        made.append(load_file(host.base_dir / "output" / file["subfolder"] / file["filename"])["latent_tensor"])
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_strengths_that_do_not_fit_are_refused_in_the_nodes_words(host):
    graph = training(edits(), "edits", "beyond", strengths_told=True, usual_text_strength=9.0)
    assert "usual_text_strength is 9, and the items in" in fails(host, graph)
    graph = training(pictures(scenes.EDITING), "pictures", "none_drawn", strengths_told=True, distillation_weight=1.0)
    assert "make the items with Teacher Edits" in fails(host, graph)
