"""The scenes models that fill and edit pictures, through ComfyUI's own nodes: same numbers as headless."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from server import run_probe

from distill_core.data.masks import for_latents, hidden
from distill_core.data.random_masks import SHARES, random_masks
from distill_core.data.scenes import draw_edits, draw_rows, render
from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser
from distill_core.models.items import MASK, MASKED_IMAGE, SOURCE_IMAGE

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
    x, sigma = torch.randn(3, *scenes.LATENT_SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0.75, 0.3])
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
