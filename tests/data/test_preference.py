"""Pairs for preference tuning: ranked samples that resume and grow, ties that are drawn anew, folders of pictures."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toy import CHANNELS, ToyBackend, toy_conds

from distill_core.data.buckets import report, spell
from distill_core.data.cache import CacheConfig
from distill_core.data.dataset import LatentDataset
from distill_core.data.manifest import OtherDataset
from distill_core.data.pictures import PictureConfig, read_into, survey
from distill_core.data.preference import TRIES, PreferenceConfig, best_and_worst, cache_pairs, with_rejected
from distill_core.data.real import cache_pictures
from distill_core.data.scenes import draw_rows, draw_words, render
from distill_core.data.shards import Shard, fill
from distill_core.models import mini, scenes
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.scorers import class_score, open_scorer, scored, words_score

FOUR = PreferenceConfig(4)


def brightness(latents, items):
    return latents.mean((1, 2, 3)).double()


def make(folder, score=brightness, preference=FOUR, stop: int | None = None, scorer: str = "", **changes):
    settings = dict(count=20, steps=2, guidance=2.0, sizes=((4, 6), (6, 4)), shard_size=8, batch_size=4)
    cond, empty = toy_conds()
    config, teacher = CacheConfig(**{**settings, **changes}), Guided(Denoiser(ToyBackend()), empty, 2.0)
    told = {"scorer": scorer}
    for number, _ in enumerate(cache_pairs(teacher, cond, CHANNELS, config, preference, score, folder, told), 1):
        if number == stop:
            return None
    return LatentDataset(folder)


# Ranked samples


def test_the_best_is_chosen_and_the_worst_rejected():
    values = {0: [3.0, 1.0, 2.0], 1: [5.0, 6.0, 9.0]}
    draw = lambda items, stream: torch.tensor(  # noqa: E731
        [values[i][int(stream.split()[1].split(".")[1])] for i in items]
    ).view(-1, 1, 1, 1)
    chosen, rejected = best_and_worst(draw, lambda latents, items: latents.flatten(), [0, 1], PreferenceConfig(3))
    assert chosen.flatten().tolist() == [3, 9] and rejected.flatten().tolist() == [1, 5]


def test_ties_are_drawn_anew_and_the_others_kept():
    """Item 7 ties in its first two turns; item 5 is drawn once."""
    drawn = []

    def draw(items, stream):
        turn, which = map(int, stream.split()[1].split("."))
        drawn.extend((item, turn) for item in items)
        tied = lambda item: item == 7 and turn < 2  # noqa: E731
        return torch.tensor([10.0 * turn + (0 if tied(item) else which) for item in items]).view(-1, 1, 1, 1)

    chosen, rejected = best_and_worst(draw, lambda latents, items: latents.flatten(), [5, 7], PreferenceConfig(2))
    assert chosen.flatten().tolist() == [1, 21] and rejected.flatten().tolist() == [0, 20]
    assert drawn.count((5, 0)) == 2 and drawn.count((7, 2)) == 2 and (5, 1) not in drawn


def test_a_scorer_that_tells_nothing_apart_ends_with_a_sentence():
    calls = []
    draw = lambda items, stream: calls.append(stream) or torch.zeros(len(items), 1, 1, 1)  # noqa: E731
    with pytest.raises(ValueError, match=f"samples of item 3 apart, which were drawn {TRIES} times.*margin"):
        best_and_worst(draw, lambda latents, items: latents.flatten(), [3], PreferenceConfig(2))
    assert len(set(calls)) == 2 * TRIES


def test_pairs_come_in_order_and_farther_apart_than_the_margin(tmp_path):
    dataset = make(tmp_path, preference=PreferenceConfig(4, margin=0.05))
    assert len(dataset) == 20 and sorted(dataset.shapes) == [(4, 4, 6), (4, 6, 4)]
    for bucket in dataset.buckets.values():
        batch = dataset.read(bucket)
        gap = brightness(batch.latents, []) - brightness(batch.beside["rejected"], [])
        assert (gap > 0.05).all() and batch.states is None
    assert dataset.manifest()["preference"] == {"samples": 4, "margin": 0.05}


def test_a_stopped_command_makes_the_same_pairs(tmp_path):
    whole = make(tmp_path / "whole")
    make(tmp_path / "stopped", stop=3)
    assert len(LatentDataset(tmp_path / "stopped")) < 20
    again = make(tmp_path / "stopped")
    make(tmp_path / "grown", count=10)
    grown = make(tmp_path / "grown")
    for other in (again, grown):
        for a, b in zip(whole.paths, other.paths, strict=True):
            assert a.name == b.name and a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(preference=PreferenceConfig(3)), "preference.samples is 3 now, was 4"),
        (dict(scorer="another"), "scorer is another one now"),
        (dict(seed=5), "seed is 5 now, was 0"),
    ],
)
def test_another_ranking_is_another_dataset(tmp_path, changes, message):
    make(tmp_path, count=4)
    with pytest.raises(OtherDataset, match=message):
        make(tmp_path, **{"count": 4, **changes})


def test_pairs_have_no_states(tmp_path):
    with pytest.raises(ValueError, match="state_sigmas are of the teacher's paths"):
        make(tmp_path, state_sigmas=(1.0,))


@pytest.mark.parametrize("wrong", [dict(samples=1), dict(samples=-1), dict(margin=-0.5)])
def test_impossible_rankings_are_refused(wrong):
    with pytest.raises(ValueError, match="samples|margin"):
        PreferenceConfig(**wrong)


def test_a_rejected_latent_that_is_not_finite_is_not_stored(tmp_path):
    cond, _ = toy_conds(2)
    bad = torch.full((2, 4, 4, 6), float("nan"))
    make_items = lambda items, shard: {"latents": torch.ones(2, 4, 4, 6), **cond.tensors(), "rejected": bad}  # noqa: E731
    with pytest.raises(ValueError, match="non-finite rejected for items 0-1"):
        list(fill(tmp_path, [Shard(range(2), (4, 6))], make_items, 2, "float32", {}))


# Scorers


def test_the_mini_models_scorer_knows_its_classes():
    """Real pictures (the example pictures are inverted) score higher with their own class than with another."""
    folder = mini.ASSETS.parent / "pictures"
    pictures, _ = survey(folder, PictureConfig(size=64, step=16))
    images = -torch.stack([read_into(picture, (64, 64), "white") for picture in pictures])
    own, other = (class_score(images, words) for words in ([p.caption for p in pictures], ["trouser"] * len(pictures)))
    assert own.dtype == torch.float64 and (own <= 0).all() and ((own > other).float().mean() > 0.7)


def test_the_scenes_models_scorer_knows_its_words():
    """Drawn scenes score higher with each of their own words than with another one, of as many as a prompt names."""
    words = draw_words(5, range(6))
    images, _ = render(words, draw_rows(5, range(6)))
    own = [scenes.caption(row) for row in words.tolist()]
    other = own[1:] + own[:1]
    assert (words_score(images, own) > words_score(images, other)).all()
    few = [text.split()[0] for text in own]
    assert (words_score(images, few) >= words_score(images, own)).all()  # words that are left out do not count
    assert not words_score(images[:1], [""]).any()


def test_a_scorer_of_ones_own_is_a_function_in_a_file(tmp_path):
    (tmp_path / "scorer.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3)).tolist()\n")
    scorer = open_scorer(str(tmp_path / "scorer.py"))
    assert scored(scorer, torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no scorer .*score.images, prompts."),
        ("x = 1\n", "has no function score"),
        ("import nowhere_at_all\n", "cannot be opened: No module named 'nowhere_at_all'"),
    ],
)
def test_scorers_that_cannot_be_opened_are_named(tmp_path, text, message):
    if text:
        (tmp_path / "s.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_scorer(str(tmp_path / "s.py"))


@pytest.mark.parametrize(
    "answer, message", [(torch.zeros(3), r"shape \[3\] for 2 images"), ([0.0, float("nan")], "finite numbers")]
)
def test_scores_that_are_none_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        scored(lambda images, prompts: answer, torch.zeros(2, 3, 4, 4), ["a", "b"])


# Folders of pictures

SETTINGS = PictureConfig(size=64, step=16, batch_size=2)


def draw_folders(root, count: int = 6) -> None:
    """Chosen pictures with captions, every second one wide, and rejected ones in another format."""
    for which in ("chosen", "rejected"):
        (root / which / "more").mkdir(parents=True)
        for number in range(count):
            size = (64, 64) if number % 2 else (96, 48)
            image = Image.effect_noise(size, 20 + 10 * number + (which == "chosen")).convert("RGB")
            image.save(root / which / "more" / f"{number}.{'png' if which == 'chosen' else 'bmp'}")
            if which == "chosen":
                (root / which / "more" / f"{number}.txt").write_text("bag")


def encode(images):
    return torch.nn.functional.avg_pool2d(images, 8).repeat(1, 2, 1, 1)[:, :4]


def cache_folders(root, out):
    settings = replace(SETTINGS, rejected=str(root / "rejected"))
    pictures, left_out = survey(root / "chosen", settings)
    pictures, without = with_rejected(pictures, settings)
    cond, empty = toy_conds(1)
    conds_of = lambda numbers: cond[[0] * len(numbers)]  # noqa: E731
    for _ in cache_pictures(pictures, left_out | without, encode, conds_of, empty, out, settings, {}):
        pass
    return LatentDataset(out), pictures, left_out | without


def test_pictures_of_the_same_name_become_pairs(tmp_path):
    draw_folders(tmp_path)
    dataset, pictures, left_out = cache_folders(tmp_path, tmp_path / "out")
    assert len(dataset) == 6 and len(dataset.buckets) == 2 and not left_out
    for bucket in dataset.buckets.values():
        batch = dataset.read(bucket)
        assert batch.beside["rejected"].shape == batch.latents.shape
        assert not (batch.beside["rejected"] == batch.latents).all()
    assert all("rejected" in file for file in report(pictures, {}, SETTINGS)["files"].values())
    before = {path.name: path.read_bytes() for path in dataset.paths}
    dataset.paths[0].unlink()  # as after a kill; the same command makes it again
    again, *_ = cache_folders(tmp_path, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in again.paths} == before


def test_pictures_that_are_no_pairs_are_left_out_and_named(tmp_path):
    draw_folders(tmp_path)
    worse = tmp_path / "rejected" / "more"
    (worse / "0.bmp").unlink()
    Image.new("RGB", (32, 64)).save(worse / "1.bmp")
    (worse / "2.bmp").write_bytes(b"no picture")
    (worse / "3.bmp").unlink()
    shutil.copy(tmp_path / "chosen" / "more" / "3.png", worse / "3.png")
    dataset, _, left_out = cache_folders(tmp_path, tmp_path / "out")
    assert len(dataset) == 2
    assert left_out["more/0.png"] == "has no rejected picture of its name"
    assert left_out["more/1.png"] == "is 64 x 64 and its rejected picture 32 x 64: crop both alike"
    assert left_out["more/2.png"].startswith("has a rejected picture that cannot be read (not a picture")
    assert left_out["more/3.png"] == "is the same file as its rejected picture"


def test_another_rejected_picture_is_named(tmp_path):
    draw_folders(tmp_path)
    cache_folders(tmp_path, tmp_path / "out")
    Image.effect_noise((64, 64), 99).convert("RGB").save(tmp_path / "rejected" / "more" / "1.bmp")
    with pytest.raises(OtherDataset, match=r"1 with another rejected picture \(more/1.png\)"):
        cache_folders(tmp_path, tmp_path / "out")


def test_folders_without_one_pair_are_refused(tmp_path):
    draw_folders(tmp_path, 1)
    Image.new("RGB", (64, 64)).save(tmp_path / "rejected" / "another.png")
    (tmp_path / "rejected" / "more" / "0.bmp").unlink()
    with pytest.raises(ValueError, match="no picture has a rejected one in .*: more/0.png has no rejected picture"):
        cache_folders(tmp_path, tmp_path / "out")


def test_the_rejected_folder_may_lie_inside_of_the_others(tmp_path):
    """Its pictures are no chosen ones then, and are not named among what is left out."""
    draw_folders(tmp_path)
    shutil.move(tmp_path / "rejected", tmp_path / "chosen" / "rejected")
    config = replace(SETTINGS, rejected=str(tmp_path / "chosen" / "rejected"))
    pictures, unread = survey(tmp_path / "chosen", config)
    assert len(pictures) == 12 and not unread
    found, left_out = with_rejected(pictures, config)
    assert len(found) == 6 and left_out == {} and all(picture.rejected for picture in found)
    assert "each with a rejected one: 6 pairs" in spell(report(found, left_out, config))
    with pytest.raises(ValueError, match="all pictures are rejected ones, of .*give the folder of the preferred ones"):
        with_rejected(survey(config.rejected, config)[0], config)


def test_the_example_pairs_are_the_example_pictures_lit_from_two_sides():
    """Inverted back, and darker by up to 70 % towards the right (preferred) or the left (rejected)."""
    folders = [mini.ASSETS.parent / name for name in ("pictures", "preferred", "rejected")]
    for plain in sorted(folders[0].glob("*.png")):
        read = [np.asarray(Image.open(folder / plain.name).convert("L"), dtype=float) for folder in folders]
        light = np.linspace(1, 0.3, read[0].shape[1])
        for picture, side in zip(read[1:], (light, light[::-1]), strict=True):
            assert np.abs(picture - (255 - read[0]) * side).max() <= 0.5
        assert (folders[1] / plain.name).with_suffix(".txt").read_text() == plain.with_suffix(".txt").read_text()
