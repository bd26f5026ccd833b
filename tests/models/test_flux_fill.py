"""FLUX.1 Fill headless: its input is that of diffusers' own pipeline."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import flux_fill, watched

from distill_core.data.masks import for_pixels, hidden
from distill_core.models.items import MASKED_IMAGE, PIXEL_MASK
from distill_core.models.pipelines import ModelConfig, open_source

SIDES = 80, 48  # width and height of the picture: not square on purpose


@pytest.fixture(scope="module")
def pipeline():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return flux_fill()


@pytest.fixture(scope="module")
def source(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fill")
    pipeline.save_pretrained(folder)
    return open_source(ModelConfig(path=str(folder)), embedded_guidance=30.0)


def test_the_network_is_told_what_the_pipeline_tells_it(pipeline, source, monkeypatch):
    """Latent, masked picture and mask of the first step, token by token, and the answer to them."""
    from diffusers.pipelines.flux import pipeline_flux_fill as module

    monkeypatch.setattr(module, "retrieve_latents", partial(module.retrieve_latents, sample_mode="argmax"))
    rng = numpy.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (SIDES[1], SIDES[0], 3), dtype=numpy.uint8))
    mask = Image.fromarray(rng.integers(0, 2, (SIDES[1], SIDES[0]), dtype=numpy.uint8) * 255)
    asked = dict(image=picture, mask_image=mask, width=SIDES[0], height=SIDES[1], strength=1.0, output_type="latent")
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    with watched(pipeline.transformer) as (told, answers):
        pipeline("cat", num_inference_steps=2, guidance_scale=30.0, generator=random, **asked)

    image = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    drawn = (torch.from_numpy(numpy.array(mask)) > 0).float()[None, None]
    items = {MASKED_IMAGE: source.encode_images(hidden(image, drawn)), PIXEL_MASK: for_pixels(drawn)}
    cond, _ = source.encode(["cat"])
    latents = pipeline._unpack_latents(told[0]["hidden_states"][..., :16], SIDES[1], SIDES[0], 8)
    seen, entry = [], source.backend.network.x_embedder
    handle = entry.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        answer = source.backend.forward(latents, told[0]["timestep"], cond.with_items(items))
    handle.remove()
    torch.testing.assert_close(seen[0], told[0]["hidden_states"], atol=1e-5, rtol=1e-5)
    expected = pipeline._unpack_latents(answers[0], SIDES[1], SIDES[0], 8)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
