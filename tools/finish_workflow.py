"""A workflow as the frontend wrote it, with its layout, groups, note, colours and links to models."""

from __future__ import annotations

from layout import LANE, TITLE, Layout, Link, arrange
from model_links import models_of
from workflow_groups import COLOURS, GROUPS, NOTE, group_of

NOTE_WIDTH, LINE, LETTERS = 700.0, 17.0, 115  # pixels, pixels, letters on a line of the note
MARGIN, HEAD = 24.0, 56.0  # between a group's edge and its nodes; above them
BELOW = 50.0  # between the note and the groups
LEAST = (270.0, 0.0)
ROOM = {  # nodes that show a picture or a text of their own: least width and height
    "SaveImage": (320.0, 380.0),
    "PreviewImage": (320.0, 380.0),
    "PreviewAny": (320.0, 260.0),
    "LoadImage": (300.0, 400.0),
    "MaskPreview": (280.0, 330.0),
    "CLIPTextEncode": (320.0, 180.0),
    "TurboDistillPrompts": (320.0, 220.0),
}
SAYS = 190.0  # more height, for the text that these write under themselves
TALKERS = (
    *("TurboDistillSampler", "TurboDistillPreset", "TurboDistillSaveLora", "TurboDistillTeacherLatents"),
    *("TurboDistillPictureFolder", "TurboDistillTeacherEdits", "TurboDistillEditingStrengths"),
)
LIVE = 340.0  # more height, for the live picture of a trainer or a comparison
SEEDS = ("PrimitiveInt",)  # whose value stays as it is after a run


def finished(measured: dict, workflow: dict, note: str) -> dict:
    """The graph to be saved. measured: ``graph`` and ``sizes`` of frontend.js; workflow: its source."""
    graph, keys = measured["graph"], list(workflow)
    nodes = {node["id"]: node for node in graph["nodes"]}
    key_of = {number: keys[number - 1] for number in nodes}
    links = {entry[0]: Link(entry[1], entry[2], entry[3]) for entry in graph["links"]}
    trains = any(node["type"].endswith("Trainer") for node in nodes.values())
    bands = {number: group_of(key_of[number], node["type"], trains) for number, node in nodes.items()}
    sizes = {number: _size(node["type"], measured["sizes"][str(number)]) for number, node in nodes.items()}
    layout = arrange(sizes, bands, list(links.values()))
    for number, node in nodes.items():
        left, top, width, height = layout.nodes[number]
        node["pos"], node["size"] = [round(left), round(top + TITLE)], [round(width), round(height - TITLE)]
        _dress(node, key_of[number])
    graph["nodes"].append(_note(max(nodes) + 1, note, layout))
    graph["last_node_id"] = max(nodes) + 1
    graph["groups"] = _groups(layout, bands)
    graph["extra"] = {**_reroutes(links, layout), "ds": {"scale": 0.5, "offset": [60, 120]}}
    return graph


def _size(kind: str, measured: list[float]) -> tuple[float, float]:
    """Width and height with the title: as measured, with room for what the node will show."""
    width, height = ROOM.get(kind, LEAST)
    more = SAYS if kind in TALKERS else LIVE if kind.endswith(("Trainer", "Compare", "Retention")) else 0.0
    width = max(width, 360.0) if kind.endswith("Trainer") else width
    return max(width, min(measured[0], 420.0)), max(height, measured[1]) + more


def _dress(node: dict, key: str) -> None:
    if key in COLOURS:
        node["color"], node["bgcolor"] = COLOURS[key], _lighter(COLOURS[key])
    models = models_of(node.get("widgets_values") or [])
    if models:
        node["properties"]["models"] = models
    if node["type"] in SEEDS:
        node["widgets_values"][1] = "fixed"


def _lighter(colour: str) -> str:
    """The body's colour to a title's, as in core's palette: #232 -> #353, #322 -> #533."""
    return {"#232": "#353", "#322": "#533"}[colour]


def _note(number: int, text: str, layout: Layout) -> dict:
    """The note, above all groups."""
    height = _note_height(text)
    top = min(box[1] for box in layout.nodes.values()) - HEAD - BELOW - height
    return {
        "id": number,
        "type": NOTE,
        "pos": [0, round(top + TITLE)],
        "size": [round(NOTE_WIDTH), round(height - TITLE)],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "How to use this",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _note_height(text: str) -> float:
    """Enough for the text with its wrapped lines, and the title."""
    lines = sum(max(1.0, -(-len(line) // LETTERS)) if line else 0.6 for line in text.splitlines())
    return TITLE + 40.0 + LINE * lines


def _groups(layout: Layout, bands: dict[int, int]) -> list[dict]:
    """A rectangle around the nodes of each band."""
    groups = []
    for band in sorted(set(bands.values())):
        boxes = [layout.nodes[number] for number in bands if bands[number] == band]
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
        area = [left - MARGIN, top - HEAD, right - left + 2 * MARGIN, bottom - top + HEAD + MARGIN]
        groups.append(
            {
                "id": len(groups) + 1,
                "title": GROUPS[band],
                "bounding": [round(value) for value in area],
                "color": "#3f789e",
                "font_size": 24,
                "flags": {},
            }
        )
    return groups


def _reroutes(links: dict[int, Link], layout: Layout) -> dict:
    """The lanes' ends as the frontend's reroutes; a link's last one is its parent."""
    made: dict[tuple, dict] = {}
    last: dict[int, int] = {}
    for number, link in links.items():
        parent = None
        lanes = sorted(
            (lane for lane in layout.lanes if lane[:2] == (link.source, link.slot)), key=lambda lane: lane[2]
        )
        for lane in lanes:
            left, right, y = layout.lanes[lane]
            if right > layout.nodes[link.target][0]:
                break
            for x in (left, right):
                point = made.setdefault(
                    (lane, x),
                    {"id": len(made) + 1, "parentId": parent, "pos": [round(x), round(y + LANE / 2)], "linkIds": []},
                )
                point["linkIds"].append(number)
                parent = point["id"]
        if parent is not None:
            last[number] = parent
    points = [{key: value for key, value in point.items() if value is not None} for point in made.values()]
    return {
        "reroutes": points,
        "linkExtensions": [{"id": number, "parentId": parent} for number, parent in last.items()],
    }
