"""The locale file and the help pages say what the nodes say of themselves."""

from __future__ import annotations

import json
import re
import sys

import pytest
from server import REPO

sys.path.append(str(REPO / "tools"))
from make_node_texts import COMMAND, DOCS, LOCALE, inputs_of, locale, outputs_of, with_tables  # noqa: E402

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}


@pytest.fixture(scope="module")
def ours(host) -> dict:
    return {name: node for name, node in host.object_info().items() if name.startswith("TurboDistill")}


def test_the_locale_file_is_that_of_the_nodes(ours):
    assert json.loads(LOCALE.read_text(encoding="utf-8")) == locale(ours), COMMAND


def test_every_node_has_a_page_and_no_page_is_left_over(ours):
    assert PAGES.keys() == ours.keys()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_every_input_and_output(ours, name):
    rows = re.findall(r"^\| (\S[^|]*) \|", PAGES[name], re.MULTILINE)
    wanted = [*inputs_of(ours[name]), *(output for output, _ in outputs_of(ours[name]))]
    assert [key for key in wanted if key not in rows] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_tables_are_those_of_the_node(ours, name):
    assert PAGES[name] == with_tables(PAGES[name], ours[name]), COMMAND


def test_every_input_and_output_has_a_tooltip(ours):
    empty = [
        (name, key)
        for name, node in ours.items()
        for key, (_, settings) in inputs_of(node).items()
        if not settings.get("tooltip")
    ]
    empty += [(name, output) for name, node in ours.items() for output, tip in outputs_of(node) if not tip]
    assert empty == []


def test_the_server_serves_every_page(host, ours):
    for name in ours:
        assert len(host.get(f"/extensions/turbo-distill/docs/{name}.md")) > 200
