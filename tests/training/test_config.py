from dataclasses import asdict

import pytest

from distill_core.methods.add import ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.training.config import Config, describe_keys, load_config


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
    sections = [section for section in asdict(Config()).values() if isinstance(section, dict)]
    assert all(f"\n{key} = " in "\n" + text for section in sections for key in section)


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
    assert config.ladd.terms == {"adversarial": 1.0, "pairs": 0.5} and config.train.betas == (0.0, 0.9)
    assert {type(value) for value in (*config.ladd.terms.values(), *config.train.betas)} == {float}


@pytest.mark.parametrize(
    "text, message",
    [
        ("[trian]\nsteps = 3", "unknown section.*trian"),
        ("model = 3", "unknown section.*model"),
        ("[train]\nstep = 3", r"\[train\]: unknown key \['step'\]; known: .*steps"),
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
    with pytest.raises(ValueError, match="there is no config file .*none.toml"):
        load_config(tmp_path / "none.toml")
