import math

import pytest
import torch
from card import Card, read_as_lists
from toy import TERMS, cache_toy, toy_run

from distill_core.training.figures import Figures
from distill_core.training.loop import training_step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def test_figures_are_read_together_and_keep_their_order():
    figures = Figures()
    figures.add({"a": torch.tensor(0.1), "b": torch.tensor(2.0, dtype=torch.bfloat16)})
    figures.require_finite("first", torch.tensor(1.0))
    figures.add({"a": torch.tensor(math.nan)})
    figures.require_finite("second", torch.tensor(math.inf))
    figures.require_finite("third", torch.tensor(math.nan))
    assert not figures.logs and figures.read() == ["second", "third"] and figures.read() == []
    assert figures.logs["a"][0] == torch.tensor(0.1).item() and math.isnan(figures.logs["a"][1])
    assert figures.logs["b"] == [2.0] and figures.logs.keys() == {"a", "b"}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("updates", [1, 3])
def test_a_step_reads_the_device_once_for_each_update(dataset, terms, updates):
    run = toy_run(dataset, ladd=TERMS[terms], accumulation=2, discriminator_updates=updates)
    training_step(run)  # the optimizers have their state then
    weights = [p for player in run.players for p in (*player.parameters.values(), *player.buffers.values())]
    card = Card([*weights, *run.method.teacher.backend.network.parameters()])
    with card, read_as_lists(card):
        training_step(run)
    assert {what: count for what, count in card.waits.items() if what.startswith("aten._local")} == {}
    assert card.waits["tolist"] == updates and not card.waits["numpy"]
