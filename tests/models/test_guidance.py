"""Guidance of text and picture: InstructPix2Pix's equation, where it is the plain one, and what it costs."""

from __future__ import annotations

import pytest
import torch

from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.guidance import GuidedTwice, edits, guided


@pytest.fixture
def editing(make_backend, make_cond, batch):
    """(denoiser that counts its forwards, empty text, x, sigma, cond) of a network that edits a picture."""
    backend = make_backend("unet", in_channels=8)
    denoiser, rows = Denoiser(backend), []
    backend.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    (x, sigma, cond), g = batch, torch.Generator().manual_seed(3)
    return (
        denoiser,
        make_cond(1, seed=9),
        x,
        sigma,
        cond.with_items({"source_image": torch.randn(x.shape, generator=g)}),
        rows,
    )


def with_strengths(cond, text, image):
    return cond.with_items({"text_strength": torch.tensor(text), "image_strength": torch.tensor(image)})


def test_it_is_the_papers_equation_of_each_item(editing):
    denoiser, empty, x, sigma, cond, rows = editing
    told = with_strengths(cond, [7.5, 3.0], [1.5, 1.0])
    found = GuidedTwice(denoiser, empty, 2.0)(x, sigma, told)
    assert rows == [6]
    picture = empty.rows_for(cond)
    none = picture.with_items({"source_image": torch.zeros_like(x)})
    process = denoiser.process

    def noise(which):  # what the paper's equation is of: the network's own output
        from distill_core.diffusion.process import expand_like

        return (x - denoiser(x, sigma, which)) / expand_like(sigma, x)

    e_none, e_picture, e_both = (noise(which) for which in (none, picture, cond))
    text, image = torch.tensor([7.5, 3.0]).view(2, 1, 1, 1), torch.tensor([1.5, 1.0]).view(2, 1, 1, 1)
    expected = e_none + image * (e_picture - e_none) + text * (e_both - e_picture)
    torch.testing.assert_close(found, process.calculate_denoised(sigma, expected, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "image", "forwards"),
    [(1.0, 1.0, 1), (4.5, 1.0, 2), (4.5, 4.5, 2), (1.0, 1.5, 3), (7.5, 1.5, 3), (0.0, 1.0, 2)],
)
def test_what_has_no_weight_is_not_run(editing, text, image, forwards):
    denoiser, empty, x, sigma, cond, rows = editing
    with_text = denoiser(x, sigma, cond)
    rows.clear()
    model = GuidedTwice(denoiser, empty, text, image_scale=image)
    answer = model(x, sigma, cond)
    assert rows == [2 * forwards]
    rows.clear()
    torch.testing.assert_close(model.around(with_text, x, sigma, cond), answer)
    assert rows == [2 * (forwards - 1)] * (forwards > 1)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_with_the_picture_kept_it_is_guidance_of_the_text(editing, scale):
    denoiser, empty, x, sigma, cond, _ = editing
    expected = Guided(denoiser, empty, scale)(x, sigma, cond)
    assert torch.equal(GuidedTwice(denoiser, empty, scale)(x, sigma, cond), expected)
    told = with_strengths(cond, [scale, scale], [1.0, 1.0])
    assert torch.equal(GuidedTwice(denoiser, empty, 9.0, image_scale=3.0)(x, sigma, told), expected)
    drawn = torch.tensor([scale, 2.0])
    torch.testing.assert_close(
        GuidedTwice(denoiser, empty, 9.0, drawn)(x, sigma, cond), Guided(denoiser, empty, 9.0, drawn)(x, sigma, cond)
    )


def test_items_of_a_batch_do_not_mix(editing):
    denoiser, empty, x, sigma, cond, _ = editing
    told = with_strengths(cond, [7.5, 1.0], [1.5, 1.0])
    together = GuidedTwice(denoiser, empty, 1.0)(x, sigma, told)
    for row in range(2):
        alone = GuidedTwice(denoiser, empty, 1.0)(x[row : row + 1], sigma[row : row + 1], told[[row]])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_network_that_edits_gets_it_and_others_do_not(editing, make_backend):
    denoiser, empty, *_ = editing
    other = Denoiser(make_backend("unet"))
    assert edits(denoiser) and type(guided(denoiser, empty, 2.0)) is GuidedTwice
    assert not edits(other) and type(guided(other, empty, 2.0)) is Guided


def test_a_picture_that_is_missing_is_named(editing):
    denoiser, empty, x, sigma, cond, _ = editing
    with pytest.raises(ValueError, match="takes source_image of every picture"):
        GuidedTwice(denoiser, empty, 2.0, image_scale=1.5)(x, sigma, type(cond)(cond.context, cond.pooled))
