import argparse

import pytest

from distill_core.cli.presets import add_presets_command
from distill_core.presets.table import presets


def run(*argv):
    parser = argparse.ArgumentParser()
    add_presets_command(parser.add_subparsers())
    args = parser.parse_args(["presets", *argv])
    args.command(args)


def test_command_lists_all_and_prints_one(capsys):
    run()
    assert len(capsys.readouterr().out.splitlines()) == len(presets())
    run("flux-schnell", "--steps", "2")
    out = capsys.readouterr().out
    assert "2 steps: 1, 0.5, 0" in out and "black-forest-labs/flux" in out
    with pytest.raises(ValueError, match="not 7"):
        run("flux-schnell", "--steps", "7")
