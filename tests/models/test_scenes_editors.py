"""The scenes models that are shown a picture: what they begin as, and what the shipped files can do."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.process import expand_like
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.evaluation.samples import evaluation_samples
from distill_core.experiments.train_scenes_editors import ITEMS, draw, left_out, widened
from distill_core.models import scenes
from distill_core.models.denoiser import Cond, Denoiser
from distill_core.models.guidance import GuidedTwice, guided
from distill_core.models.items import EXTRA, MASK, MASKED_IMAGE, SOURCE_IMAGE, filled, wrong_shape, wrong_values
from distill_core.models.pipelines import ModelConfig, open_source

KINDS = [scenes.INPAINTING, scenes.EDITING]
TEST = 7


@pytest.fixture(scope="module", params=KINDS)
def items(request):
    """A kind, 24 of its items that no training drew, and their conditionings."""
    drawn = draw(request.param, TEST, 24)
    texts = scenes.encode_text([scenes.caption(words) for words in drawn["words"].tolist()])
    told = {name.removeprefix(EXTRA): value for name, value in drawn.items() if name.startswith(EXTRA)}
    return request.param, drawn, texts.with_items(told)


def test_items_are_as_declared_and_each_has_its_own_numbers(items):
    kind, drawn, cond = items
    tensors = {"latents": drawn["latents"], **{EXTRA + name: value for name, value in cond.extra.items()}}
    assert not wrong_shape({name: value.shape for name, value in tensors.items()}) and not wrong_values(tensors)
    assert tuple(cond.extra) == ((MASK, MASKED_IMAGE) if kind == scenes.INPAINTING else (SOURCE_IMAGE,))
    encode = scenes.load_autoencoder().encoder
    with torch.no_grad():
        alone = ITEMS[kind](TEST, range(5, 6), encode)
    torch.testing.assert_close(alone["latents"][0], drawn["latents"][5], rtol=0, atol=1e-4)


def test_a_network_begins_as_the_scenes_model_whatever_it_is_told(items):
    kind, drawn, cond = items
    x, sigma = drawn["latents"][:2], torch.tensor([300.0, 900.0])
    text = {"encoder_hidden_states": cond.context[:2], "pooled_projections": cond.pooled[:2], "timestep": sigma}
    shown = torch.cat([x, *(value[:2] for value in cond.extra.values())], 1)
    with torch.no_grad():
        begun = widened(kind).eval()(hidden_states=shown, **text).sample
        plain = scenes.load_transformer()(hidden_states=x, **text).sample
    assert shown.shape[1] == scenes.CHANNELS[kind]
    torch.testing.assert_close(begun, plain, rtol=0, atol=1e-5)


def test_texts_and_pictures_are_left_out_as_often_as_said():
    generator = torch.Generator().manual_seed(0)
    silent, blind = left_out(scenes.EDITING, 40_000, generator)
    shares = [(silent & ~blind), (~silent & blind), (silent & blind)]
    assert [round(s.double().mean().item(), 2) for s in shares] == [0.05, 0.05, 0.05]
    silent, blind = left_out(scenes.INPAINTING, 40_000, generator)
    assert abs(silent.double().mean() - 0.1) < 0.01 and not blind.any()


def test_the_shipped_file_denoises_better_when_it_is_shown_the_picture(items):
    kind, drawn, cond = items
    source = open_source(ModelConfig(path=f"scenes_{kind}"))
    assert source.backend.limits().items == tuple(cond.extra)
    x0, sigma = drawn["latents"], torch.full((24,), 0.8)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = expand_like(sigma, x0) * noise + (1 - expand_like(sigma, x0)) * x0
    blind = cond.with_items({name: torch.zeros_like(value) for name, value in cond.extra.items()})
    with torch.no_grad():
        shown, hidden, plain = (
            (Denoiser(backend)(x, sigma, told) - x0).square().mean().item()
            for backend, told in (
                (source.backend, cond),
                (source.backend, blind),
                (scenes.scenes_backend(), Cond(cond.context, cond.pooled)),
            )
        )
    assert shown < 0.6 * plain and shown < 0.6 * hidden


def test_the_inpainting_model_fills_a_hole_with_what_the_words_say():
    drawn = draw(scenes.INPAINTING, TEST, 24)
    source = open_source(ModelConfig(path="scenes_inpainting"))
    captions = [scenes.caption(words) for words in drawn["words"].tolist()]
    conds, uncond = source.encode(captions)
    hole = torch.zeros_like(drawn[EXTRA + MASK])
    hole[:, :, 1:7, 1:7] = 1
    picture = source.decode(drawn["latents"])
    masked = source.encode_images(picture * (1 - torch.nn.functional.interpolate(hole, scale_factor=scenes.PIXELS)))
    cond = conds.with_items({MASK: hole, MASKED_IMAGE: masked})
    model = guided(Denoiser(source.backend), uncond, scenes.GUIDANCE)
    sigmas = grid_sigmas(model.process, 8)
    made = evaluation_samples(model, sigmas, cond, scenes.LATENT_SHAPE, count=24, sampler="euler")
    result = filled(made, drawn["latents"], cond.extra)
    outside = (1 - hole).bool().expand_as(result)
    assert torch.equal(result[outside], drawn["latents"][outside])
    assert rate(result, drawn["words"]) > 0.8
    beside = (made - drawn["latents"]).square()
    assert beside[outside].mean() < 0.5 * beside[~outside].mean()  # it was shown what is outside


def test_the_editing_model_keeps_the_picture_and_changes_the_word():
    drawn = draw(scenes.EDITING, TEST, 24)
    source = open_source(ModelConfig(path="scenes_editing"))
    conds, uncond = source.encode([scenes.caption(words) for words in drawn["words"].tolist()])
    before = drawn[EXTRA + SOURCE_IMAGE]
    model = guided(Denoiser(source.backend), uncond, 2.0)
    assert isinstance(model, GuidedTwice)
    sigmas = grid_sigmas(model.process, 8)
    cond = conds.with_items({SOURCE_IMAGE: before})
    made = evaluation_samples(model, sigmas, cond, scenes.LATENT_SHAPE, count=24, sampler="euler")
    assert rate(made, drawn["words"]) > 0.8
    true, other = drawn["latents"], drawn["latents"].roll(1, 0)
    assert (made - true).square().mean() < 0.4 * (made - other).square().mean()


def rate(latents, words) -> float:
    """The share of words that the classifier of images finds."""
    classifier, _ = scenes.load_classifier("pixel")
    with torch.no_grad():
        groups = scenes.by_group(classifier(open_source(ModelConfig(path="scenes")).decode(latents)))
    right = [part.argmax(1) == words[:, g] for g, part in enumerate(groups.values())]
    return torch.stack(right).double().mean().item()
