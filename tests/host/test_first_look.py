"""What a trainer shows before anything is unfolded, in both node designs of the real frontend; and that a workflow of
an older version opens with its values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import BROWSER_FOUND, drive

MOST = 10
DESIGNS = {"classic": False, "nodes 2.0": True}
OLDER = Path(__file__).with_name("older_workflow.json")
OLD = ("TurboDistillLADDTrainer", "TurboDistillADDTrainer", "TurboDistillDiffusion2GANTrainer")  # of the older workflow
TRAINERS = (*OLD, "TurboDistillTuneTrainer", "TurboDistillAdapterTrainer")
# The names of the widgets that a page shows: drawn on the canvas in the classic design, elements in the other.
VISIBLE = """
(async () => {
  const drawn = node => node.getLayoutWidgets().filter(widget => node.isWidgetVisible(widget)).map(({name}) => name);
  const rows = node => [...document.querySelectorAll(`[data-node-id="${node.id}"] [data-testid="node-widget"]`)]
    .filter(row => row.offsetHeight > 0).length;
  const found = {};
  for (const node of app.graph._nodes) {
    const values = Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]));
    const look = () => ({ drawn: drawn(node), rows: rows(node), height: node.computeSize()[1] });
    const first = look();
    node.toggleAdvanced(); // what "Show Advanced" in its menu does
    await new Promise(done => setTimeout(done, 500));
    found[node.type] = { values, first, unfolded: look() };
    node.toggleAdvanced();
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def looks(host) -> dict:
    """What each design shows of one node of each trainer, and of the older workflow."""
    if not BROWSER_FOUND:
        pytest.skip("no Node.js with playwright-core and Chromium: set PLAYWRIGHT_PATH and CHROMIUM")
    api = {str(i + 1): {"class_type": name, "inputs": {}} for i, name in enumerate(TRAINERS)}
    jobs = [
        {"name": f"{kind} {design}", **what, "settings": {"Comfy.VueNodes.Enabled": vue}, "ask": VISIBLE}
        for design, vue in DESIGNS.items()
        for kind, what in {"new": {"api": api}, "older": {"graph": json.loads(OLDER.read_text())}}.items()
    ]
    return {result["name"]: result for result in drive(host.url, jobs)}


@pytest.mark.case("host classic page", "at most ten widgets at first, in both node designs")
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_shows_at_most_ten_widgets_until_it_is_asked_for_more(looks, trainer, design):
    """Unfolded, it shows all; in the classic design without gaps where the others were."""
    look = looks[f"new {design}"]["answer"][trainer]
    first, unfolded = look["first"], look["unfolded"]
    shown = [entry["rows"] if DESIGNS[design] else len(entry["drawn"]) for entry in (first, unfolded)]
    assert 0 < shown[0] <= MOST < shown[1]
    if not DESIGNS[design]:
        assert shown[1] == len(look["values"])
        a_widget = (unfolded["height"] - first["height"]) / (shown[1] - shown[0])
        assert a_widget == pytest.approx(24), "LiteGraph's 20 pixels and 4 between them"


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("trainer", OLD)
def test_an_older_workflow_opens_with_its_values(host, looks, trainer, design):
    """The file is of the version before `existing_run`, hardly a value at its default; what came since has its own."""
    (node,) = (node for node in json.loads(OLDER.read_text())["nodes"] if node["type"] == trainer)
    names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    names.insert(names.index("seed") + 1, "fixed")  # what happens to the seed after a run: the frontend's own widget
    older = dict(zip(names, node["widgets_values"], strict=True))
    values = looks[f"older {design}"]["answer"][trainer]["values"]
    assert {name: values[name] for name in older} == older
    since = {name: values[name] for name in values.keys() - older.keys()}
    assert "existing_run" in since and since == {name: defaults(host, trainer)[name] for name in since}


def defaults(host, trainer: str) -> dict:
    """What a new node's widgets show."""
    inputs = host.object_info()[trainer]["input"]
    return {
        name: spec[1].get("default", spec[0][0] if isinstance(spec[0], list) else None)
        for kind in inputs.values()
        for name, spec in kind.items()
        if isinstance(spec, list) and len(spec) > 1
    }
