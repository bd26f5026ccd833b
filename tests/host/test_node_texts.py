"""The locale file and the help pages say what the nodes say of themselves."""

from __future__ import annotations

import json
import re
import sys

import pytest
from server import COMFYUI, REPO

sys.path.append(str(REPO / "tools"))
from make_node_texts import (  # noqa: E402
    COMMAND,
    DOCS,
    LANGUAGES,
    inputs_of,
    locale,
    locale_file,
    locales,
    outputs_of,
    table_of,
    with_tables,
    words_of,
)

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}


@pytest.fixture(scope="module")
def ours(host) -> dict:
    return {name: node for name, node in host.object_info().items() if name.startswith("TurboDistill")}


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_locale_file_is_that_of_the_nodes(ours, language):
    assert json.loads(locale_file(language).read_text(encoding="utf-8")) == locales(ours)[language], COMMAND


@pytest.mark.case("host languages", "names, widgets and tooltips in Chinese and Japanese; none missing, none stale")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", ["names", "texts"])
def test_every_word_is_translated_and_none_is_stale(ours, language, kind):
    """If this fails, write the translation into locales/LANGUAGE.json, then run tools/make_node_texts.py."""
    wanted, table = words_of(locale(ours))[kind], table_of(language)[kind]
    assert sorted(wanted - table.keys()) == [], f"missing in locales/{language}.json, {kind}"
    assert sorted(table.keys() - wanted) == [], f"stale in locales/{language}.json, {kind}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_keeps_names_and_numbers(language):
    """Paths, settings and figures of the English text stand in the translation, too."""
    kept = re.compile(r"[a-z]+_[a-z_]+|\d+\.\d+|\d+e-\d+|output/\S+[^\s.,;)]|`[^`]+`|\"\w+\"")
    for english, words in table_of(language)["texts"].items():
        assert [found for found in kept.findall(english) if found not in words] == [], english


def test_the_server_offers_them(host):
    for language, name in (("zh", "LADD 训练器"), ("ja", "LADD 学習")):
        assert host.get("/i18n")[language]["nodeDefs"]["TurboDistillLADDTrainer"]["display_name"] == name


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


@pytest.mark.case("memory 5.7", "the tooltip says which sizes of DINOv2 the host opens")
def test_the_vision_networks_that_the_host_opens_are_named():
    source = (COMFYUI / "comfy" / "clip_vision.py").read_text()
    texts = json.loads(locale_file("en").read_text(encoding="utf-8"))["TurboDistillADDTrainer"]
    said = texts["inputs"]["clip_vision"]["tooltip"]
    assert [size for size in ("small", "base", "large", "giant") if f"dino2_{size}.json" in source] == [
        "large",
        "giant",
    ]
    assert "large and giant only" in said


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
