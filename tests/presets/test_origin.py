"""What is said of a student that is used elsewhere than where it was made."""

from __future__ import annotations

import json

import pytest

from distill_core.presets.origin import origin_notes

STYLE = {"digest": "feed", "strength": 0.8, "layers": 3}
MADE = {"base": "0123", "base_layout": "ComfyUI", "below": json.dumps([STYLE])}


def test_nothing_is_said_where_it_was_made():
    assert origin_notes(MADE, "0123", "ComfyUI", [STYLE]) == []
    assert origin_notes({}, "0123", "ComfyUI", []) == []


@pytest.mark.case("training L2", "base and the LoRAs below are compared when a student is used")
def test_another_model_and_a_missing_or_other_lora_are_told():
    (base,) = origin_notes(MADE, "4567", "ComfyUI", [STYLE])
    assert "its base is 0123, this one is 4567" in base
    (missing,) = origin_notes(MADE, "0123", "ComfyUI", [])
    assert "the LoRA feed at strength 0.8, which the model does not have" in missing and "merge_upstream" in missing
    (weaker,) = origin_notes(MADE, "0123", "ComfyUI", [{**STYLE, "strength": 0.5}])
    assert "strength 0.8; here that LoRA has strength 0.5" in weaker


def test_digests_over_other_names_are_not_compared():
    assert origin_notes({"base": "0123", "base_layout": "diffusers"}, "4567", "ComfyUI", []) == []
    assert origin_notes({"base": "0123"}, "4567", "ComfyUI", []) == [], "older files are the command line's"
    assert len(origin_notes({"base": "0123"}, "4567", "diffusers", [])) == 1
    assert len(origin_notes(MADE, "4567", "diffusers", [])) == 1, "the LoRA is missing there all the same"
    assert origin_notes(MADE, "4567", "diffusers", [{**STYLE, "digest": "beef"}]) == [], "it may be that one"
