"""The ground of scenes: its judges see words in real pictures, and its real pictures are its own."""

from __future__ import annotations

import torch

from distill_core.data.scenes import draw_rows, draw_words, render
from distill_core.experiments.grounds import GROUNDS, SCENES
from distill_core.models import scenes


def test_the_judges_find_the_words_of_real_pictures():
    ground = GROUNDS[SCENES]()
    items = range(240)
    words = draw_words(99, items)
    images, _ = render(words, draw_rows(99, items))
    with torch.no_grad():
        latents = scenes.load_autoencoder().encoder(images)
    figures = ground.evaluator(latents[:120])(latents, dict(zip(scenes.GROUPS, words.T, strict=True)))
    for suffix in ("", "_pixels"):
        assert figures[f"alignment{suffix}"].value > 0.9
        for group in scenes.GROUPS:
            assert figures[f"accuracy_{group}{suffix}"].value > 0.8
    noise = ground.evaluator(latents[:120])(torch.randn_like(latents))
    assert noise["fd"].value > 20 * figures["fd"].value


def test_its_real_pictures_show_what_their_prompts_say(tmp_path):
    ground = GROUNDS[SCENES]()
    assert ground.photographs is not None and not ground.photographs_need
    latents, conds = ground.photographs(tmp_path, 130, 3)
    assert len(latents) == len(conds) == 130
    assert torch.equal(conds[108].context, ground.conds[:1].context)
    net, _ = scenes.load_classifier("latent")
    said = scenes.by_group(net(torch.stack(latents)))["colour"].argmax(1)
    assert (said == ground.labels_of(130)["colour"]).float().mean() > 0.95
