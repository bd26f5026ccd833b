import os
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from distill_core.cli.main import main
from distill_core.methods.add import ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.training.config import SECTIONS, WIDTH, Config, describe_keys, load_config, settings_table


@pytest.fixture
def load(tmp_path):
    def load(text: str) -> Config:
        (tmp_path / "c.toml").write_text(text)
        return load_config(tmp_path / "c.toml")

    return load


def test_an_empty_file_gives_the_defaults(load):
    assert load("") == Config()


def test_the_printed_defaults_are_a_file_with_the_defaults(load):
    text = describe_keys()
    assert load(text) == Config()
    every = asdict(Config())
    sections = [section for section in {**every.pop("methods"), **every}.values() if isinstance(section, dict)]
    assert len(sections) == len(SECTIONS)
    assert all(f"\n{key} = " in "\n" + text for section in sections for key in section)


def test_the_printed_defaults_explain_every_key_within_the_width():
    lines = describe_keys().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(above.startswith("# ") for above, line in pairwise(lines) if " = " in line and line[0] != "#")


def test_the_page_of_settings_is_what_the_command_prints(capsys):
    assert main(["settings"]) == 0
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == capsys.readouterr().out == settings_table(), (
        "write it anew: python -m distill_core settings > docs/settings.md"
    )


def test_a_file_is_read_as_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "c.toml").write_bytes('[prompts]\nnegative = "Fréchet"'.encode())
    code = "import sys; from distill_core.training.config import load_config; load_config(sys.argv[1])"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.toml")], env=ascii_only, check=True)
    assert load_config(tmp_path / "c.toml").prompts.negative == "Fréchet"


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "c.toml").write_bytes('[prompts]\nnegative = "Fréchet"'.encode("latin-1"))
    with pytest.raises(ValueError, match="c.toml is not UTF-8 text"):
        load_config(tmp_path / "c.toml")


KINDS = {"ladd": LADDConfig, "add": ADDConfig, "diffusion2gan": Diffusion2GANConfig}


@pytest.mark.parametrize("method, kind", KINDS.items())
def test_the_method_chooses_its_section(load, method, kind):
    config = load(f'method = "{method}"\n[{method}]\nr1 = 0.5')
    assert type(config.method_config) is kind and config.method_config.r1 == 0.5


def test_values_arrive_in_the_types_of_the_settings(load):
    config = load(
        """
        [cache]
        sizes = [[8, 8], [6, 10]]
        state_sigmas = [1, 0.5]
        guidance = 3
        [model]
        taps = ["transformer_blocks.0"]
        gradient_checkpointing = true
        [ladd]
        terms = { adversarial = 1, pairs = 0.5 }
        [train]
        betas = [0, 0.9]
        """
    )
    assert config.cache.sizes == ((8, 8), (6, 10)) and config.cache.state_sigmas == (1.0, 0.5)
    assert config.cache.guidance == 3.0 and type(config.cache.guidance) is float
    assert config.model.taps == ("transformer_blocks.0",) and config.model.gradient_checkpointing is True
    assert config.methods["ladd"].terms == {"adversarial": 1.0, "pairs": 0.5} and config.train.betas == (0.0, 0.9)
    assert {type(value) for value in (*config.methods["ladd"].terms.values(), *config.train.betas)} == {float}


@pytest.mark.parametrize(
    "text, message",
    [
        ("[trian]\nsteps = 3", "unknown section 'trian'; 'train' is known; known: .*train"),
        ("[Train]\nsteps = 3", "unknown section 'Train'; 'train' is known"),
        ("metod = 'ladd'", "unknown key 'metod'; 'method' is known"),
        ("model = 3", r"model is a section: write \[model\]"),
        ("[[train]]\nsteps = 3", r"train is a section: write \[train\]"),
        ("[train]\nstep = 3", r"\[train\]: unknown key 'step'; 'steps' is known; known: .*steps"),
        ("[ladd]\ncheckpoint_every = 3", r"\[ladd\]: unknown key 'checkpoint_every'; it belongs to \[train\]"),
        ("[model]\nmethod = 'ladd'", r"\[model\]: unknown key 'method'; it belongs to the top of the file"),
        ("[train]\ntrackers = 'tensorboard'", r"\[train\] trackers must be of type list of str, not str"),
        ("[data]\nmix = ['a']", r"\[data\] mix must be of type table of float, not list"),
        ("[train]\nsteps = 3.5", r"\[train\] steps must be of type int, not float"),
        ("[train]\nsteps = true", r"\[train\] steps must be of type int, not bool"),
        ("[train]\nstudent_lr = true", r"\[train\] student_lr must be of type float, not bool"),
        ('[train]\nsteps = "3"', r"\[train\] steps must be of type int, not str"),
        ("[model]\ngradient_checkpointing = 1", "must be of type bool"),
        ("[model]\npath = [1]", r"\[model\] path must be of type str"),
        ("[train]\nbetas = [0.9]", r"\[train\] betas must be"),
        ("[cache]\nsizes = [8, 8]", r"\[cache\] sizes must be of type"),
        ("[cache]\nsizes = [[8, 8, 8]]", r"\[cache\] sizes must be of type"),
        ('[ladd]\nstudent_sigmas = ["a"]', r"\[ladd\] student_sigmas must be of type float"),
        ('[ladd]\nterms = { adversarial = "a" }', r"\[ladd\] terms.adversarial must be of type float"),
        ("[ladd]\nterms = { gan = 1.0 }", "terms must weight"),
        ("[ladd]\nterms = 1.0", r"\[ladd\] terms must be of type"),
        ("[train]\nsteps = 0", "must be at least 1"),
        ('[model]\ndtype = "int8"', "dtype must be one of"),
        ("[train", "not valid TOML"),
    ],
)
def test_mistakes_are_named(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*none.toml"):
        load_config(tmp_path / "none.toml")


@pytest.mark.case("training D11", "a TOML file may have a byte order mark, and a Windows path says how it is written")
def test_a_byte_order_mark_and_windows_paths(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert load_config(tmp_path / "c.toml").train.steps == 7
    (tmp_path / "c.toml").write_text('[model]\npath = "C:\\Users\\me"\n')
    with pytest.raises(ValueError, match="c.toml is not valid TOML.*with / or in single quotes"):
        load_config(tmp_path / "c.toml")
