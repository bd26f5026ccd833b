"""A method describes itself: what the registry, the loop and the files know of it comes from its own file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from toy import TAPS, cache_toy, toy_method, toy_parts

from distill_core.diffusion.noise import ItemNoise
from distill_core.files import load_tensors
from distill_core.methods.base import StudentMethod
from distill_core.methods.config import MethodConfig
from distill_core.methods.ladd import LADD, LADDConfig
from distill_core.methods.players import Player
from distill_core.methods.registry import METHODS, new_method
from distill_core.training.loop import Run, TrainConfig, train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_and_has_the_terms_it_knows(dataset, name):
    config = METHODS[name]()
    assert config.name == name and config.title and "arXiv" in config.paper
    method = toy_method(dataset, config)
    assert set(method.terms()) == set(config.known_terms)
    players = method.players(TrainConfig(student_lr=0.5, discriminator_lr=0.25))
    judged = [("discriminator", 0.25)] if config.weight("adversarial") else []
    wanted = [("generator", 0.5), *judged]
    assert [(p.name, p.lr) for p in players][: len(wanted)] == wanted  # who else plays is the method's own affair
    assert config.title_with_terms() == config.title
    if {"adversarial", "consistency"} <= set(config.known_terms):
        both = METHODS[name]({"adversarial": 1.0, "consistency": 1.0})
        assert both.title_with_terms() == f"{config.title} + consistency"


@dataclass(frozen=True)
class ThreeConfig(MethodConfig):
    """A fourth method, made in this file alone."""

    name: ClassVar[str] = "three"
    title: ClassVar[str] = "Three players"
    paper: ClassVar[str] = "none"
    known_terms = ("pairs", "consistency", "guess")

    def build(self, ingredients):
        return Three(ingredients.student, ingredients.teacher, self, **ingredients.shared())


class Three(StudentMethod):
    """The student, and two networks that guess the mean of its latents; the second has state beside its weights."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.guesses = [nn.Linear(4, 1), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))]

    def terms(self):
        return {**super().terms(), "guess": lambda step: self.guesses[0](step.fake.mean((2, 3))).square().mean()}

    def _loss(self, index: int):
        def loss(step):
            mean = step.fake.detach().mean((2, 3))
            value = (self.guesses[index](mean) - mean.mean(1, keepdim=True)).square().mean()
            return value, {f"guess {index}": value}

        return loss

    def players(self, settings) -> list[Player]:
        student = Player("generator", self.generator_loss, self.student.trainable(), settings.student_lr)
        first, second = (dict(guess.named_parameters()) for guess in self.guesses)
        buffers = dict(self.guesses[1].named_buffers())
        return [
            student,
            Player("guess", self._loss(0), first, 0.1, updates=2, optimizer={"betas": (0.9, 0.95)}),
            Player("second guess", self._loss(1), second, 0.2, buffers=buffers, optimizer={"weight_decay": 0.5}),
        ]


def three_run(dataset, folder=None, **settings) -> Run:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ThreeConfig({"pairs": 1.0, "guess": 0.1})
        method = new_method(config, toy_parts(), dataset.batch(0, 2, 0), 2, uncond=dataset.uncond(), guidance=2.0)
    return Run(method, dataset, TrainConfig(batch_size=4, student_lr=1e-3, **{"steps": 6, **settings}), folder)


def test_a_method_of_another_file_trains_with_any_number_of_players(dataset, tmp_path):
    """Each with its own optimiser settings and state; resumed, it ends as if it had not been stopped."""
    run = three_run(dataset, tmp_path / "a")
    groups = {name: optimizer.param_groups[0] for name, optimizer in run.optimizers.items()}
    assert groups["guess"]["betas"] == (0.9, 0.95) and groups["generator"]["betas"] == (0.0, 0.99)
    assert groups["second guess"]["weight_decay"] == 0.5 and groups["guess"]["weight_decay"] == 0.0
    for event in train(run):
        assert {"pairs", "guess 0", "guess 1", "second guess_grad_norm"} <= event.logs.keys()
        if event.step == 3:
            break
    del run
    for other in (three_run(dataset, tmp_path / "a"), three_run(dataset, tmp_path / "b")):
        assert [event.step for event in train(other)][-1] == 6
    (a, _), (b, _) = (load_tensors(tmp_path / x / "checkpoint.safetensors") for x in "ab")
    assert any(key.startswith("buffer.second guess.") for key in a)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_student_has_one_update_a_step(dataset):
    class Impatient(Three):
        def players(self, settings) -> list[Player]:
            first, *others = super().players(settings)
            return [replace(first, updates=2), *others]

    method = three_run(dataset).method
    method.__class__ = Impatient
    with pytest.raises(ValueError, match="one update a step"):
        Run(method, dataset, TrainConfig(batch_size=4))


# Named streams


def test_a_stream_depends_on_its_name_and_item_alone():
    first, second = ItemNoise(3, [4, 5]), ItemNoise(3, [5])
    first.named("other").normal(7), first.uniform()
    a = first.named("level").normal(2)
    assert torch.equal(a[1], second.named("level").normal(2)[0])
    assert not torch.equal(a[1], second.named("noise").normal(2)[0])
    assert not torch.equal(a, first.named("level").normal(2)), "a stream goes on"


def test_what_a_term_draws_does_not_depend_on_who_asked_first(dataset):
    """The discriminator's noise level and noise are the same whatever other terms there are, and in any order."""
    seen = []
    for terms, first in (({"adversarial": 1.0}, "renoise"), ({"adversarial": 1.0, "pairs": 1.0}, "renoise_time")):
        config = LADDConfig({**terms, "consistency": 0.5} if first == "renoise" else terms, warmup_steps=0)
        method = toy_method(dataset, config)
        step = method.start(dataset.batch(0, 4, 0), ItemNoise(0, range(4)), 0)
        getattr(step, first)
        seen.append((step.renoise_time, step.renoise, step.noise))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_relativistic_loss_changes_no_draw(dataset):
    """It asks for the real features before the discriminator does."""
    steps = []
    for gan_loss in ("hinge", "relativistic"):
        method = toy_method(dataset, LADDConfig(gan_loss=gan_loss, shared_renoise=False, warmup_steps=0))
        assert isinstance(method, LADD) and method.taps == TAPS
        step = method.start(dataset.batch(0, 4, 0), ItemNoise(0, range(4)), 0)
        method.generator_loss(step), method.discriminator_loss(step)
        steps.append(step)
    assert torch.equal(steps[0].real_noised, steps[1].real_noised) and torch.equal(steps[0].renoise, steps[1].renoise)
