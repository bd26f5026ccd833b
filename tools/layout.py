"""Where the nodes of a workflow lie: columns by depth in the graph, and links that never run behind a node.

A link to the next column is drawn by the frontend in the gap between them. One that goes further gets a lane through
every column on its way: a free strip between the nodes, whose two ends become reroutes. Links from one output share
their lanes. (Layers with dummy nodes, as in Sugiyama, Tagawa and Toda 1981.)

All lengths are in pixels of the canvas; a node's size is (width, height) with its title.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

TITLE = 30.0  # height of a node's title, which lies above its position
BETWEEN = 50.0  # free height between two nodes of a column
LANE = 50.0  # height of a lane
HEAD = 60.0  # free height above a column's first node, for the name of its group
GAP = 90.0  # least width between two columns
OUT = 45.0  # how far a lane reaches into the gaps on its two sides
SWEEPS = 6


@dataclass(frozen=True)
class Link:
    source: int
    slot: int  # of the source's outputs
    target: int


Lane = tuple[int, int, int]  # source, slot, column
Box = tuple[float, float, float, float]  # left, top, width, height


@dataclass
class Layout:
    """nodes: with their titles. lanes: left end, right end, height (y)."""

    nodes: dict[int, Box] = field(default_factory=dict)
    lanes: dict[Lane, tuple[float, float, float]] = field(default_factory=dict)


def columns_of(bands: dict[int, int], links: Sequence[Link]) -> dict[int, int]:
    """The column of every node: right of all it takes from, and of all nodes of earlier bands.

    bands: node -> band. Raises ValueError where a link goes back to an earlier band.
    """
    columns: dict[int, int] = {}
    start = 0
    for band in sorted(set(bands.values())):
        members = [node for node in bands if bands[node] == band]

        def column(node: int, members=members, start=start) -> int:
            if node not in columns:
                before = [link.source for link in links if link.target == node]
                late = [source for source in before if source not in columns and source not in members]
                if late:
                    raise ValueError(f"node {node} takes from {late[0]}, which lies in a later group")
                columns[node] = max([start, *(column(source) + 1 for source in before)])
            return columns[node]

        start = max(column(node) for node in members) + 1
    return columns


def arrange(sizes: dict[int, tuple[float, float]], bands: dict[int, int], links: Sequence[Link]) -> Layout:
    """The place of every node and lane. sizes: node -> width, height, in the order of the workflow."""
    columns = columns_of(bands, links)
    stacks: list[list[Hashable]] = [[] for _ in range(max(columns.values()) + 1)]
    for node in sizes:
        stacks[columns[node]].append(node)
    edges = set()
    for link in links:
        previous: Hashable = link.source
        for column in range(columns[link.source] + 1, columns[link.target]):
            lane = (link.source, link.slot, column)
            if lane not in stacks[column]:
                stacks[column].append(lane)
            edges.add((previous, lane))
            previous = lane
        edges.add((previous, link.target))
    _untangle(stacks, edges)
    return _placed(stacks, edges, sizes)


def _untangle(stacks: list[list[Hashable]], edges: set) -> None:
    """Sort every column by the mean place of its neighbours, forth and back: fewer links cross."""
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        place = {item: i / len(stack) for stack in stacks for i, item in enumerate(stack)}
        for stack in stacks if forth else stacks[::-1]:
            wanted = {}
            for item in stack:
                near = [a if forth else b for a, b in edges if (b if forth else a) == item]
                wanted[item] = sum(place[other] for other in near) / len(near) if near else place[item]
            stack.sort(key=lambda item: (wanted[item], place[item]))
            place |= {item: i / len(stack) for i, item in enumerate(stack)}


def _placed(stacks: list[list[Hashable]], edges: set, sizes: dict[int, tuple[float, float]]) -> Layout:
    layout, x = Layout(), 0.0
    before: list[Hashable] = []
    heights: dict[Hashable, float] = {}  # where links leave an item
    for stack in stacks:
        width = max((sizes[item][0] for item in stack if item in sizes), default=0.0)
        middles, y, seen = {}, 0.0, False
        last_node = max((i for i, item in enumerate(stack) if item in sizes), default=-1)
        for i, item in enumerate(stack):
            if item in sizes:
                y += (BETWEEN if seen else HEAD) if i else 0.0
                seen = True
                middles[item] = (y, y + sizes[item][1])
                y += sizes[item][1]
            else:
                came = [heights[a] for a, b in edges if b == item]
                if i > last_node:  # nothing below it: it may lie where it comes from
                    y = max(y, came[0] - LANE)
                middles[item] = (y + LANE, y + LANE)
                y += LANE
        reach = [abs(end - heights[a]) for item in stack for a, b in edges if b == item for end in middles[item]]
        if layout.nodes:
            lanes = sum(OUT for items in (before, stack) if any(item not in sizes for item in items))
            x += max(GAP, 40.0 + lanes + 0.12 * max(reach, default=0.0))
        before = stack
        for item, (top, _) in middles.items():
            if item in sizes:
                layout.nodes[item] = (x, top, width, sizes[item][1])
                heights[item] = top + TITLE + 20.0
            else:
                layout.lanes[item] = (x - OUT, x + width + OUT, top)
                heights[item] = top
        x += width
    return layout
