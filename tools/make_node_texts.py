"""Write what the nodes say of themselves to where the frontend reads it: locales/*/nodeDefs.json, and the tables of
inputs and outputs in web/docs/*.md.

The English words are the nodes' own. locales/zh.json and ja.json are tables from them to another language, written by
hand: "names" of inputs and outputs, and "texts".

Run it with ComfyUI's Python after any change of a node's inputs or tooltips (no server, no browser; a few seconds):

    COMFYUI_PATH=~/comfy/ComfyUI ~/comfy/venv/bin/python tools/make_node_texts.py

The text around the tables is written by hand and stays as it is. tests/host/test_node_texts.py fails when a file is
not up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LOCALES = REPO / "locales"
LANGUAGES = ("zh", "ja")
DOCS = REPO / "web" / "docs"
COMMAND = "run tools/make_node_texts.py with ComfyUI's Python"
BEGIN = "<!-- tables: written by tools/make_node_texts.py from the node's tooltips -->"
END = "<!-- end of tables -->"


def inputs_of(node: dict) -> dict[str, tuple]:
    """Name -> (type or options, settings) of every input, in the node's order."""
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def outputs_of(node: dict) -> list[tuple[str, str]]:
    """(name, tooltip) of every output."""
    return [(name, tip or "") for name, tip in zip(node["output_name"], node["output_tooltips"], strict=True)]


def locale(object_info: dict) -> dict:
    """Names and tooltips of our nodes in the form of the frontend's locale files."""
    return {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {key: {"name": key, "tooltip": entry[1]["tooltip"]} for key, entry in inputs_of(node).items()},
            "outputs": {
                str(i): {"name": name} | ({"tooltip": tip} if tip else {})
                for i, (name, tip) in enumerate(outputs_of(node))
            },
        }
        for name, node in object_info.items()
        if name.startswith("TurboDistill")
    }


def table_of(language: str) -> dict[str, dict[str, str]]:
    """The hand-written table of a language: "names" and "texts", from English."""
    return json.loads((LOCALES / f"{language}.json").read_text(encoding="utf-8"))


def words_of(english: dict) -> dict[str, set[str]]:
    """What a table must have for such a locale: the names of inputs and outputs, and all other texts."""
    parts = [part for node in english.values() for kind in ("inputs", "outputs") for part in node[kind].values()]
    texts = {node[key] for node in english.values() for key in ("display_name", "description")}
    return {
        "names": {part["name"] for part in parts},
        "texts": texts | {part["tooltip"] for part in parts if "tooltip" in part},
    }


def translated(english: dict, table: dict[str, dict[str, str]]) -> dict:
    """A locale in another language; what the table lacks stays English.

    An input's tooltip ends with its English name, by which messages and help pages call it.
    """
    names, texts = table["names"], table["texts"]

    def part(kind: str, given: dict) -> dict:
        name, tip = names.get(given["name"], given["name"]), given.get("tooltip", "")
        tip = texts.get(tip, tip)
        if kind == "inputs" and name != given["name"]:
            tip += f" [{given['name']}]"
        return {"name": name} | ({"tooltip": tip} if tip else {})

    return {
        key: {
            "display_name": texts.get(node["display_name"], node["display_name"]),
            "description": texts.get(node["description"], node["description"]),
            **{kind: {i: part(kind, given) for i, given in node[kind].items()} for kind in ("inputs", "outputs")},
        }
        for key, node in english.items()
    }


def locales(object_info: dict) -> dict[str, dict]:
    """The locale of every language."""
    english = locale(object_info)
    return {"en": english} | {language: translated(english, table_of(language)) for language in LANGUAGES}


def as_text(entries: dict) -> str:
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def locale_file(language: str) -> Path:
    return LOCALES / language / "nodeDefs.json"


def tables(node: dict) -> str:
    """The node's inputs (name, meaning, default) and outputs in Markdown, between the two markers."""
    required = node["input"].get("required", {})
    lines = [BEGIN, "", "| Input | Meaning | Default |", "|---|---|---|"]
    for name, (_, settings) in inputs_of(node).items():
        lines.append(f"| {name} | {cell(settings['tooltip'])} | {default_of(settings, name in required)} |")
    lines += ["", "| Output | Meaning |", "|---|---|"]
    lines += [f"| {name} | {cell(tip)} |" for name, tip in outputs_of(node)]
    return "\n".join([*lines, "", END])


def default_of(settings: dict, required: bool) -> str:
    """The default of a widget; whether an input without one must be connected."""
    if "default" not in settings:
        return "(connect)" if required else "(optional)"
    value = settings["default"]
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.7f}".rstrip("0").rstrip(".")
    return cell(f"{value}") or "empty"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_tables(page: str, node: dict) -> str:
    """A help page with its tables as they are now. Raises ValueError for a page without the two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the help page of {node['name']} needs the lines {BEGIN!r} and {END!r} around its tables")
    return before + tables(node) + after


def main() -> None:
    sys.path.insert(0, str(REPO / "tests" / "host"))
    from launch import enter_host

    enter_host("pack")
    object_info = {node["name"]: node for node in (cls.GET_NODE_INFO_V1() for cls in sys.modules["pack.nodes"].NODES)}
    for language, entries in locales(object_info).items():
        locale_file(language).parent.mkdir(exist_ok=True)
        locale_file(language).write_text(as_text(entries), encoding="utf-8")
    for name, node in object_info.items():
        path = DOCS / f"{name}.md"
        path.write_text(with_tables(path.read_text(encoding="utf-8"), node), encoding="utf-8")


if __name__ == "__main__":
    main()
