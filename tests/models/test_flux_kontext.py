"""FLUX.1 Kontext headless: a picture to go by is further tokens, as in diffusers' own pipeline."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from tiny_pipelines import flux_kontext, watched

from distill_core.models.denoiser import Denoiser
from distill_core.models.guidance import GuidedTwice, guided
from distill_core.models.items import REFERENCE
from distill_core.models.pipelines import ModelConfig, open_source

SIDES, THEIRS = (12, 16), (20, 8)  # width and height of what is made, and of the picture to go by


@pytest.fixture(scope="module")
def pipeline():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return flux_kontext()


@pytest.fixture(scope="module")
def source(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    pipeline.save_pretrained(folder)
    return open_source(ModelConfig(path=str(folder)), embedded_guidance=2.5)


def test_the_network_is_told_what_the_pipeline_tells_it(pipeline, source, monkeypatch):
    """Tokens and positions of the first step, and the answer to them."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as module

    monkeypatch.setattr(module, "retrieve_latents", partial(module.retrieve_latents, sample_mode="argmax"))
    pixels = numpy.random.default_rng(0).integers(0, 255, (THEIRS[1], THEIRS[0], 3), dtype=numpy.uint8)
    sizes = dict(width=SIDES[0], height=SIDES[1], max_area=SIDES[0] * SIDES[1])
    pipeline.set_progress_bar_config(disable=True)
    asked = dict(num_inference_steps=2, guidance_scale=2.5, _auto_resize=False, output_type="latent")
    random = torch.Generator().manual_seed(0)
    with watched(pipeline.transformer) as (told, answers):
        pipeline(image=Image.fromarray(pixels), prompt="cat", generator=random, **sizes, **asked)

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    cond = source.encode(["cat"])[0].with_items({REFERENCE: source.encode_images(image)})
    unpack = lambda tokens: pipeline._unpack_latents(tokens, SIDES[1], SIDES[0], 2)  # noqa: E731
    count = SIDES[0] * SIDES[1] // 16
    seen, network = [], source.backend.network
    handle = network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        latents = unpack(told[0]["hidden_states"][:, :count])
        answer = source.backend.forward(latents, told[0]["timestep"], cond)
    handle.remove()
    assert told[0]["hidden_states"].shape[1] == count + THEIRS[0] * THEIRS[1] // 16
    for name in ("hidden_states", "img_ids", "txt_ids", "encoder_hidden_states", "guidance"):
        torch.testing.assert_close(seen[0][name], told[0][name].to(seen[0][name].dtype), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer, unpack(answers[0][:, :count]), atol=1e-5, rtol=1e-5)


def test_features_are_of_the_picture_that_is_made(source):
    """A change of the latent moves the map most where it is; the picture to go by changes what is read there."""
    g, backend = torch.Generator().manual_seed(1), source.backend
    x, shown = torch.randn(1, 4, 8, 12, generator=g), torch.randn(1, 4, 6, 6, generator=g)
    cond = source.encode(["cat"])[0].with_items({REFERENCE: shown})
    changed, sigma = x.clone(), torch.tensor([0.5])
    changed[..., -2:, :2] += 3
    with torch.no_grad():
        before, after = (Denoiser(backend).features(v, sigma, cond, backend.tap_names)[-1] for v in (x, changed))
        other = Denoiser(backend).features(x, sigma, cond.with_items({REFERENCE: -shown}), backend.tap_names)[-1]
    assert before.shape[2:] == (4, 6) and not torch.equal(before, other)
    moved = (after - before).abs().mean((0, 1))
    assert divmod(moved.flatten().argmax().item(), 6) == (3, 0)


def test_a_block_is_entered_by_the_picture_that_is_made_alone(source):
    backend = source.backend
    backend.tokens = 6
    hidden = torch.randn(1, 10, 3)
    image, put = backend.block_input((), {"hidden_states": hidden})
    assert torch.equal(image, hidden[:, :6])
    _, given = put(2 * image)
    assert torch.equal(given["hidden_states"], torch.cat([2 * hidden[:, :6], hidden[:, 6:]], dim=1))


def test_a_picture_to_go_by_is_wanted(source):
    with pytest.raises(ValueError, match="takes reference_image of every picture .* no reference_image"):
        Denoiser(source.backend)(torch.zeros(1, 4, 4, 4), torch.ones(1), source.encode(["cat"])[0])


def test_guidance_of_the_picture_is_against_an_answer_without_its_tokens(source):
    """The equation of GuidedTwice; and without its tokens the answer is that of FLUX.1 told the text alone."""
    backend, g = source.backend, torch.Generator().manual_seed(2)
    x, sigma = torch.randn(2, 4, 8, 12, generator=g), torch.tensor([0.5, 0.9])
    texts, empty = source.encode(["cat", "dog"])
    cond = texts.with_items({REFERENCE: torch.randn(2, 4, 6, 6, generator=g)})
    teacher, plain, rows = guided(Denoiser(backend), empty, 3.0), backend.items, []
    assert type(teacher) is GuidedTwice
    teacher.image_scale = 1.5
    with torch.no_grad():
        handle = backend.network.register_forward_pre_hook(
            lambda _, args, told: rows.append(len(told["hidden_states"])), with_kwargs=True
        )
        found = teacher(x, sigma, cond)
        handle.remove()
        with_text, with_picture = (Denoiser(backend)(x, sigma, c) for c in (cond, empty.rows_for(cond)))
        try:
            backend.items = ()
            neither = Denoiser(backend)(x, sigma, empty.rows_for(texts))
        finally:
            backend.items = plain
    assert rows == [4, 2]
    expected = neither + 1.5 * (with_picture - neither) + 3.0 * (with_text - with_picture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (with_picture - neither).abs().max() > 1e-4
