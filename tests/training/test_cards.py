"""What several cards would do, on paper."""

import re

import pytest

from distill_core.cli.main import main
from distill_core.cli.plan import load_of, plan_of
from distill_core.models.mini import load_transformer
from distill_core.training.cards import SUSTAINED, Load, on_cards
from distill_core.training.config import load_config
from distill_core.training.plan import CONTEXT

# 1000 weights are trained: 4 bytes each, 4 of the average, 8 of moments; beside them a frozen network of 2000 bytes,
# 1600 of them in blocks, and 10 weights of heads with 16 bytes each.
BY_HAND = Load(
    lasting=2000 + 16_000 + 160,
    frozen=1600,
    student=16_000,
    weights=1000,
    heads=10,
    work={"the student's forward": 500, "the generator's update": 4000},
    block=400,
    student_block=100,
    gathered=10_000,
    passes=2,
    operations=int(SUSTAINED),
)


def test_shared_weights_by_hand():
    cards = on_cards(BY_HAND, 4, shared=True)
    kept = 400 + 160 + 4 * 10 + (1600 + 20 * 1000) / 4
    ahead = 2 * 400 + 6 * 100
    assert cards.needed == CONTEXT + kept + max(500 + ahead, 4 * 1000 / 4)
    assert cards.received == 0.75 * (10_000 + 2 * 4 * 1000) + 2 * 0.75 * 4 * 10
    assert cards.computing == 1.0 and cards.exchanging == cards.received / 450e9
    assert on_cards(BY_HAND, 16, shared=True).exchanging == on_cards(BY_HAND, 16, shared=True).received / 50e9


def test_whole_weights_by_hand():
    one, many = (on_cards(BY_HAND, count, shared=False) for count in (1, 64))
    assert one.needed == many.needed == CONTEXT + BY_HAND.lasting + 4 * 1010 + 4000
    assert one.received == 0 and many.received == int(2 * 63 / 64 * 4 * 1010)
    assert one.slower == (1.0, 1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("cards") / "c.toml"
    path.write_text(
        "[model]\nlora_rank = 0\ngradient_checkpointing = true\n[cache]\nsizes = [[8, 8]]\n"
        "[train]\nbatch_size = 4\naccumulation = 2\nshard = true\n"
    )
    return path


def test_the_load_of_a_real_step(config):
    """The mini model, LADD, checkpointed: the student's blocks come for the forward and again for the backward."""
    load = load_of(load_config(config))
    network = load_transformer()
    blocks = [sum(p.numel() for p in block.parameters()) for block in network.transformer_blocks]
    assert load.weights == sum(p.numel() for p in network.parameters())
    assert load.student_block == max(blocks) and load.frozen == 4 * sum(blocks)
    student = 2 * 2 * load.weights * load.passes
    assert load.passes == 2 and load.gathered > student
    # The teacher's: at most three forwards (of the fake, that again, of the real), with a block ahead in each.
    assert load.gathered - student <= load.passes * 3 * (load.frozen + load.block)
    assert load.operations > 6 * 2 * sum(blocks) * 4 * 16  # each weight of a block thrice for each of 4 x 16 tokens


def test_one_card_needs_what_the_plan_says(tmp_path):
    """Of a LoRA, attention at its full size among what is counted."""
    path = tmp_path / "c.toml"
    path.write_text("[model]\nlora_rank = 8\n[cache]\nsizes = [[16, 16]]\n[train]\nbatch_size = 16\n")
    config = load_config(path)
    planned, paper = plan_of(config).needed - CONTEXT, on_cards(load_of(config), 1, shared=False).needed - CONTEXT
    assert planned <= paper < 1.1 * planned


def test_the_command_says_what_cards_would_do(config, capsys):
    assert main(["plan", str(config), "--cards", "1", "2", "64"]) == 0
    out = capsys.readouterr().out
    rows = [re.findall(r"[\d.]+", line) for line in out.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["1", "2", "64"] and rows[0][2] == "0.00"
    assert "weights shared out" in out and "Not measured." in out
