"""Scenes from the command line: pictures with captions, and edits with true masks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.data.scenes import GROUPS


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_have_captions_and_a_seed(tmp_path):
    for folder in ("a", "b"):
        assert main(["scenes", "--out", str(tmp_path / folder), "--count", "53", "--seed", "4"]) == 0
    files = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert len(files) == 53 and files[-1] == "00052.png"
    assert pixels(tmp_path / "a" / files[0]).shape == (64, 64, 3)
    for name in (files[0], files[-1]):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    words = (tmp_path / "a" / "00052.txt").read_text().split()
    assert (
        len(words) == 5 and words.pop(3) == "on" and set(words) <= {word for group in GROUPS.values() for word in group}
    )


def test_pictures_have_the_size_that_is_asked_for(tmp_path, capsys):
    assert main(["scenes", "--out", str(tmp_path), "--count", "2", "--size", "96x64", "--edits"]) == 0
    assert pixels(tmp_path / "after" / "00001.png").shape == (64, 96, 3)
    assert pixels(tmp_path / "before_masks" / "00001.png").shape == (64, 96)
    for wrong in ("96", "32x64", "96x4096", "ax64", "-96x64"):
        with pytest.raises(SystemExit):
            main(["scenes", "--out", str(tmp_path), f"--size={wrong}"])
        assert "is no size: write WIDTHxHEIGHT, each from 64 to 1024" in capsys.readouterr().err


def test_edits_change_one_word_and_their_masks_say_where(tmp_path):
    assert main(["scenes", "--out", str(tmp_path), "--count", "40", "--edits"]) == 0
    groups = set()
    for item in range(40):
        before, after = ((tmp_path / side / f"{item:05d}.txt").read_text().split() for side in ("before", "after"))
        changed = [i for i in range(5) if before[i] != after[i]]
        assert len(changed) == 1
        groups.add(changed[0])
        masks = [pixels(tmp_path / f"{side}_masks" / f"{item:05d}.png") for side in ("before", "after")]
        moved = np.abs(np.subtract(*(pixels(tmp_path / side / f"{item:05d}.png") for side in ("before", "after")))).max(
            -1
        )
        if changed[0] in (0, 1):  # texture and colour
            assert moved[masks[0] == 0].max() <= 1 and moved.max() > 30  # 1: a mask below 1 / 510 is written as 0
        elif changed[0] == 4:  # ground
            assert moved[masks[0] == 255].max() <= 1 and moved.max() > 30
    assert groups == {0, 1, 2, 4}


def test_a_negative_seed_is_refused(tmp_path, capsys):
    assert main(["scenes", "--out", str(tmp_path), "--seed", "-1"]) == 2
    assert "must not be negative" in capsys.readouterr().err


def test_own_scenes_become_a_dataset(tmp_path):
    """`cache --images` reads the pictures; the mini model does not know their captions, so they get one of its own."""
    assert main(["scenes", "--out", str(tmp_path / "pictures"), "--count", "6"]) == 0
    for path in (tmp_path / "pictures").glob("*.txt"):
        path.write_text("bag")
    config = tmp_path / "mini.toml"
    config.write_text("[pictures]\nsize = 64\n")
    folders = ["--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "own")]
    assert main(["cache", str(config), *folders]) == 0
    assert len(LatentDataset(tmp_path / "own")) == 6
