"""The scenes model: words in, conditioning out; its files and what they hold."""

from __future__ import annotations

import pytest
import torch

from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser
from distill_core.models.pipelines import ModelConfig, ScenesSource, open_source


def test_every_combination_is_seen_or_held_out():
    seen, unseen = scenes.combinations(), scenes.combinations(held_out=True)
    both = {tuple(row) for row in torch.cat([seen, unseen]).tolist()}
    assert len(unseen) == 12 and len(both) == len(seen) + len(unseen) == 120
    for group in range(4):  # no word is missing from what the teacher saw
        assert set(seen[:, group].tolist()) == set(torch.cat([seen, unseen])[:, group].tolist())


def test_a_caption_is_read_as_its_words():
    words = [1, 1, 0, 0]
    text = scenes.caption(words)
    assert text == "striped yellow ring on cobbles"
    (tokens,) = scenes.tokenize([text]).tolist()
    assert [scenes.WORDS[t - 1] for t in tokens if t] == ["striped", "yellow", "ring", "cobbles"]
    assert scenes.tokenize([text.upper()]).tolist() == scenes.tokenize([f"a {text}"]).tolist() == [tokens]
    assert scenes.tokenize([""]).tolist() == [[0] * scenes.TOKENS]


def test_labels_are_of_the_groups_that_every_prompt_names():
    labels = scenes.labels(["striped red ring on waves", "red plain star on cobbles"])
    assert {group: classes.tolist() for group, classes in labels.items()} == {
        "texture": [1, 0],
        "colour": [0, 0],
        "shape": [0, 2],
        "ground": [1, 0],
    }
    assert list(scenes.labels(["red ring", "blue star on waves", "green cross"])) == ["colour", "shape"]
    assert scenes.labels([""]) == {}


@pytest.mark.parametrize(
    "text, match", [("a purple ring", "not 'purple'"), ("red " * (scenes.TOKENS + 1), "at most 6 words")]
)
def test_what_it_cannot_read_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        scenes.encode_text([text])


def test_conditionings_depend_on_the_words_and_not_on_the_batch():
    texts = ["striped yellow ring on cobbles", "plain yellow ring on cobbles", "", "star"]
    together = scenes.encode_text(texts)
    assert together.context.shape == (4, scenes.TOKENS, scenes.TEXT_WIDTH)
    assert together.pooled.shape == (4, scenes.TEXT_WIDTH)
    for row, text in enumerate(texts):
        torch.testing.assert_close(scenes.encode_text([text]).context[0], together.context[row], rtol=0, atol=1e-5)
    assert (together.context[0] - together.context[1]).abs().max() > 0.1


def test_the_source_gives_latents_of_its_pictures_back():
    source = open_source(ModelConfig(path="scenes"))
    assert isinstance(source, ScenesSource) and len(source.default_prompts()) == 108
    latents = source.encode_images(torch.zeros(1, 3, 64, 64))
    assert latents.shape == (1, *scenes.LATENT_SHAPE)
    assert source.decode(latents).abs().mean() < 0.2
    conds, empty = source.encode(["red ring"], negative="star")
    assert torch.equal(empty.context, scenes.encode_text(["star"]).context)
    denoised = Denoiser(source.backend)(torch.randn(1, *scenes.LATENT_SHAPE), torch.tensor([0.5]), conds)
    assert denoised.shape == (1, *scenes.LATENT_SHAPE) and denoised.isfinite().all()


def test_features_lie_where_they_are_in_the_latent():
    """A token is one position of the latent here, not 2 x 2: what changes in a corner shows first in that corner."""
    backend = scenes.scenes_backend()
    x, cond = torch.zeros(1, *scenes.LATENT_SHAPE), scenes.encode_text(["red ring"])
    changed = x.clone()
    changed[..., 0, 7] += 3.0
    (first,), (other,) = (
        Denoiser(backend).features(v, torch.tensor([0.2]), cond, backend.tap_names[:1]) for v in (x, changed)
    )
    assert first.shape[2:] == (8, 8)
    moved = (first - other).norm(dim=1)[0]
    assert moved.argmax() == 7


def test_the_files_are_small_and_say_how_they_were_made():
    sizes = {path.name: path.stat().st_size for path in scenes.ASSETS.iterdir()}
    assert sum(sizes.values()) < 36e6, sizes
    log = scenes.training_log()
    assert {"autoencoder", "latent_classifier", "pixel_classifier", "teacher"} <= log.keys()
    assert log["autoencoder"]["test_psnr_db"] > 28
