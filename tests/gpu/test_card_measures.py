"""The measures of measure_card.py: on a CPU that they measure what they say, on a card what they find there."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import measure_card
import number_formats

CARD = torch.cuda.is_available()
needs_card = pytest.mark.skipif(not CARD, reason="NO CUDA CARD: nothing of tests/gpu was measured on a GPU here")


@pytest.fixture(scope="module")
def run():
    return measure_card.mini_run("cpu", 2)


def test_the_share_of_the_backbone_is_a_share(run):
    share = measure_card.backbone_share(run, "cpu", times=1)
    assert 0.02 < share < 0.9


def test_a_step_calls_operators_and_takes_time(run):
    assert measure_card.launches(run, "cpu") > 1000
    assert measure_card.step_seconds(run, "cpu", times=1) > 0


def test_the_peak_of_a_step_is_that_of_the_plan():
    assert measure_card.planned_bytes("cpu", 2) == pytest.approx(measure_card.peak_bytes("cpu", 2), rel=0.05)


def test_the_decoded_distance_has_a_gradient():
    work, latents = measure_card.decoded_distance("cpu", 2)
    work()
    assert latents.grad.isfinite().all() and latents.grad.flatten(1).abs().sum(1).gt(0).all()


def test_number_formats_change_the_outcome_a_little(monkeypatch):
    """One step from the same weights: a rounded LoRA and rounded networks end beside the others, not at them."""
    monkeypatch.setattr(number_formats, "IMAGES", 60)
    found = measure_card.outcomes(1, [0], count=16)
    values = [of[0][1] for of in found.values()]
    assert len(set(values)) == 3 and max(values) / min(values) < 1.2
    assert measure_card.in_words(found["float32"] * 2).count("worst") == 2


def test_a_table_takes_the_place_of_the_cards_former_one():
    page = "# Cards\n\nWhat they do.\n"
    first = measure_card.with_section(page, "A card", "| 1 |")
    both = measure_card.with_section(first, "Another", "| 2 |")
    assert both == "# Cards\n\nWhat they do.\n\n## A card\n\n| 1 |\n\n## Another\n\n| 2 |\n"
    again = measure_card.with_section(both, "A card", "| 3 |")
    assert again == "# Cards\n\nWhat they do.\n\n## Another\n\n| 2 |\n\n## A card\n\n| 3 |\n"


@needs_card
def test_a_step_on_a_card():
    run = measure_card.mini_run("cuda", 32)
    assert measure_card.step_seconds(run, "cuda") > 0 and measure_card.launches(run, "cuda") > 0
    assert measure_card.waits(run) > 0, "the figures are read once"


@needs_card
def test_the_plan_on_a_card():
    assert measure_card.planned_bytes("cuda", 32) == pytest.approx(measure_card.peak_bytes("cuda", 32), rel=0.1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FEWER THAN TWO CUDA CARDS: no run on two was made")
def test_two_cards_hold_the_same_weights():
    assert measure_card.two_cards() == 0
