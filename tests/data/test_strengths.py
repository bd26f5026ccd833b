"""Strengths of items: each from its own generator, as the file will say, and part of what a dataset is."""

from __future__ import annotations

import pytest
import torch
import toy

from distill_core.data.cache import CacheConfig
from distill_core.data.manifest import OtherDataset


def test_a_draw_is_the_items_own_and_inside_its_range():
    config = CacheConfig(text_strength=(3.0, 10.0), image_strength=(1.0, 2.2), seed=5)
    every = config.strengths(range(400))
    some = config.strengths([7, 399])
    for name, low, high in (("text_strength", 3, 10), ("image_strength", 1, 2.2)):
        values = every[name]
        assert torch.equal(values[[7, 399]], some[name])
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low)
    drawn = torch.corrcoef(torch.stack(list(every.values())))
    assert abs(drawn[0, 1]) < 0.15


def test_what_is_left_out_is_the_guidance_and_the_picture_kept():
    assert CacheConfig(guidance=4.0).strengths([0, 1]) == {}
    fixed = CacheConfig(guidance=4.0, image_strength=(1.5,)).strengths([0, 1])
    assert fixed["text_strength"].tolist() == [4, 4] and fixed["image_strength"].tolist() == [1.5, 1.5]


def test_the_teacher_takes_what_the_file_will_say():
    values = CacheConfig(text_strength=(3.0, 10.0), dtype="bfloat16").strengths(range(9))["text_strength"]
    assert torch.equal(values, values.bfloat16().float()) and values.dtype == torch.float32


@pytest.mark.parametrize("span", [(3.0, 2.0), (1.0, 2.0, 3.0)])
def test_a_range_is_a_number_or_two_that_rise(span):
    with pytest.raises(ValueError, match="image_strength must be one number, or the lowest and the highest, not"):
        CacheConfig(image_strength=span)


def test_other_strengths_are_another_dataset_and_none_are_what_was_before(tmp_path):
    assert not {"text_strength", "image_strength"} & toy.cache_toy(tmp_path / "a").manifest()["config"].keys()
    toy.cache_toy(tmp_path / "b", text_strength=(3.0, 10.0))
    toy.cache_toy(tmp_path / "b", text_strength=(3.0, 10.0))
    with pytest.raises(OtherDataset, match=r"text_strength is \[3.0, 9.0\] now, was \[3.0, 10.0\]"):
        toy.cache_toy(tmp_path / "b", text_strength=(3.0, 9.0))
