"""The layout of the shipped workflows (tools/layout.py), on random graphs."""

from __future__ import annotations

import random
import sys
from itertools import combinations
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from layout import GAP, LANE, Layout, Link, arrange, columns_of  # noqa: E402


def random_graph(seed: int) -> tuple[dict, dict, list[Link]]:
    draw = random.Random(seed)
    count = draw.randint(4, 25)
    sizes = {n: (draw.choice([270.0, 340.0]), draw.uniform(60, 900)) for n in range(count)}
    bands = {n: n * 4 // count for n in range(count)}
    links = [
        Link(source, draw.randint(0, 1), n)
        for n in range(1, count)
        for source in draw.sample(range(n), min(n, draw.randint(1, 3)))
    ]
    return sizes, bands, links


@pytest.fixture(params=range(8))
def laid(request) -> tuple[Layout, dict, list[Link]]:
    sizes, bands, links = random_graph(request.param)
    return arrange(sizes, bands, links), bands, links


def apart(a, b) -> bool:
    return a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]


def test_no_two_nodes_overlap(laid):
    layout, _, _ = laid
    assert all(apart(a, b) for a, b in combinations(layout.nodes.values(), 2))


def test_links_go_right_and_groups_stand_apart(laid):
    layout, bands, links = laid
    for link in links:
        left, _, width, _ = layout.nodes[link.source]
        assert left + width + GAP <= layout.nodes[link.target][0]
    for a, b in combinations(layout.nodes, 2):
        if bands[a] < bands[b]:
            assert layout.nodes[a][0] + layout.nodes[a][2] < layout.nodes[b][0]


def test_a_link_has_a_free_lane_in_every_column_that_it_passes(laid):
    layout, _, links = laid
    for link in links:
        start, end = layout.nodes[link.source], layout.nodes[link.target]
        lanes = [place for lane, place in layout.lanes.items() if lane[:2] == (link.source, link.slot)]
        passed = {box[0] for box in layout.nodes.values() if start[0] + start[2] < box[0] < end[0]}
        assert all(any(left < x < right for left, right, _ in lanes) for x in passed)
    for left, right, top in layout.lanes.values():
        assert all(apart((left, top, right - left, LANE), box) for box in layout.nodes.values())


def test_a_link_back_to_an_earlier_group_is_refused():
    with pytest.raises(ValueError, match="later group"):
        columns_of({1: 0, 2: 1}, [Link(2, 0, 1)])
