"""The student's embedding of strengths: when it is on, that it is 0 at the default ones, its gradient, and its file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_core.discriminators.latent import LatentDiscriminator
from distill_core.models.denoiser import Denoiser
from distill_core.models.lora_start import parts_by_name
from distill_core.models.strengths import (
    StrengthsConfig,
    added_at,
    chosen_strengths,
    config_of_file,
    split_strengths,
    strengths_of,
)

CONFIG = StrengthsConfig(told=True, text=7.5, image=1.5, width=16)
CHANNELS = {"unet": 8, "sd3": 8, "flux": 32}


@pytest.fixture
def student(family, make_backend, batch, randomise):
    """(student, x, sigma, cond without strengths) of a network that edits; the embedding has learnt something."""
    channels = CHANNELS[family]
    backend = make_backend(family, in_channels=channels, out_channels=channels // 2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        view = Denoiser(backend, randomise(backend.new_lora(2)))
        view.strengths = backend.new_strengths(CONFIG)
        nn.init.normal_(view.strengths.out.weight, std=0.5)
    x, sigma, cond = batch
    return view, x, sigma, cond.with_items({"source_image": torch.ones_like(x)})


def told(cond, text, image):
    return cond.with_items({"text_strength": torch.tensor(text), "image_strength": torch.tensor(image)})


def test_at_the_default_strengths_it_is_the_student_without(student):
    view, x, sigma, cond = student
    without = Denoiser(view.backend, view.lora)(x, sigma, cond)
    assert torch.equal(view(x, sigma, cond), without)
    assert torch.equal(view(x, sigma, told(cond, [7.5, 7.5], [1.5, 1.5])), without)
    assert torch.equal(
        view.strengths(torch.tensor([[7.5, 1.5], [3.0, 1.0]]))[0], torch.zeros(view.strengths.out.out_features)
    )
    mixed = view(x, sigma, told(cond, [7.5, 3.0], [1.5, 1.5]))
    torch.testing.assert_close(mixed[0], without[0])
    assert not torch.allclose(mixed[1], without[1], atol=1e-3)


def test_a_fresh_one_changes_nothing_and_is_trained_beside_the_lora(student):
    view, x, sigma, cond = student
    fresh = Denoiser(view.backend, view.lora)
    fresh.strengths = view.backend.new_strengths(CONFIG)
    other = told(cond, [3.0, 10.0], [1.0, 2.0])
    assert torch.equal(fresh(x, sigma, other), fresh(x, sigma, cond))
    assert set(fresh.trainable()) - set(fresh.lora.state_dict()) == {
        *("strengths.hidden.weight", "strengths.hidden.bias", "strengths.out.weight")
    }


def test_both_strengths_turn_the_student_and_nobody_else(student):
    view, x, sigma, cond = student
    answers = [view(x, sigma, told(cond, [t] * 2, [i] * 2)) for t, i in ((7.5, 1.5), (4.0, 1.5), (7.5, 2.0))]
    for a in range(3):
        for b in range(a):
            assert not torch.allclose(answers[a], answers[b], atol=1e-3)
    plain, flat = Denoiser(view.backend), Denoiser(view.backend, view.lora)
    for other in (plain, flat):  # a teacher, and a student that is told none: the curve is flat
        assert torch.equal(other(x, sigma, told(cond, [4.0] * 2, [2.0] * 2)), other(x, sigma, cond))
    taps = view.backend.default_taps()
    features = [view.features(x, sigma, told(cond, [t] * 2, [1.5] * 2), taps)[-1] for t in (3.0, 10.0)]
    assert not torch.allclose(*features)


def test_its_gradient_is_that_of_differences(student, family):
    """In float64, of every weight in a random direction, through the whole network."""
    view, x, sigma, cond = student
    view.backend.network.double(), view.strengths.double()
    x, cond, g = x.double(), told(cond, [3.0, 9.0], [1.1, 2.0]), torch.Generator().manual_seed(0)
    weights = torch.randn(x.shape, generator=g, dtype=torch.float64)
    step, rtol = (1e-3, 1e-2) if family == "flux" else (1e-5, 1e-5)  # FLUX's attention turns its positions in float32

    def loss():
        return (view(x, sigma.double(), cond) * weights).sum()

    parameters = dict(view.strengths.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    for name, value in parameters.items():
        direction = torch.randn(value.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            value += step * direction
            above = loss()
            value -= 2 * step * direction
            below = loss()
            value += step * direction
        expected = (above - below) / (2 * step)
        assert abs(expected) > 1e-6
        torch.testing.assert_close((gradients[name] * direction).sum(), expected, rtol=rtol, atol=1e-8)


def test_a_block_that_is_computed_again_sees_the_same(make_backend, batch, randomise):
    x, sigma, cond = batch
    cond, gradients = told(cond.with_items({"source_image": torch.ones_like(x)}), [3.0, 9.0], [1.0, 2.0]), []
    for checkpointing in (False, True):
        backend = make_backend("sd3", gradient_checkpointing=checkpointing, in_channels=8, out_channels=4)
        backend.network.train(checkpointing)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            view = Denoiser(backend, randomise(backend.new_lora(2)))
            view.strengths = backend.new_strengths(CONFIG)
            nn.init.normal_(view.strengths.out.weight, std=0.5)
        loss = view(x, sigma, cond).square().mean()
        Denoiser(backend)(x, sigma, cond)  # the teacher's turn is between
        gradients.append(torch.autograd.grad(loss, list(view.trainable().values())))
    for one, again in zip(*gradients, strict=True):
        torch.testing.assert_close(one, again)


def test_a_file_of_it_is_read_back_and_others_pass_it_by(student):
    view, x, sigma, cond = student
    state = {**view.backend.export(view.lora), **view.strengths.export()}
    assert all("lora" in name for name in state)  # what diffusers asks of every name
    lora, embedding = split_strengths(state)
    again = Denoiser(view.backend, view.backend.open_lora(lora))
    again.strengths = view.backend.new_strengths(CONFIG)
    again.strengths.load_export(embedding)
    other = told(cond, [3.0, 10.0], [1.0, 2.0])
    torch.testing.assert_close(again(x, sigma, other), view(x, sigma, other))
    parts, strange = parts_by_name(state, view.lora.targets)
    assert set(parts) == set(view.lora.targets) and not strange
    narrow = view.backend.new_strengths(StrengthsConfig(True, width=8))
    with pytest.raises(ValueError, match="strengths are of another model"):
        narrow.load_export(embedding)


def test_the_discriminators_heads_see_them(make_cond):
    g = torch.Generator().manual_seed(2)
    maps, time, pooled = (
        [torch.randn(2, 8, 4, 4, generator=g)],
        torch.tensor([0.3, 0.6]),
        torch.randn(2, 16, generator=g),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seeing, blind = LatentDiscriminator([8], 16, width=8, strengths=True), LatentDiscriminator([8], 16, width=8)
    one, two = torch.tensor([[3.0, 1.5], [7.5, 1.5]]), torch.tensor([[3.0, 2.0], [7.5, 1.5]])
    assert torch.equal(blind(maps, time, pooled, one), blind(maps, time, pooled, two))
    first, second = (seeing(maps, time, pooled, strengths) for strengths in (one, two))
    assert not torch.allclose(first[0], second[0]) and torch.equal(first[1], second[1])
    assert strengths_of(make_cond(2)) is None
    assert torch.equal(strengths_of(told(make_cond(2), [3.0, 7.5], [1.5, 1.5])), one)


SPANS = {"text_strength": [3.0, 7.5, 10.0], "image_strength": [1.0, 1.5, 2.0]}


def test_what_a_file_adds_is_asked_without_a_network(student):
    view, *_ = student
    state = view.strengths.export()
    assert config_of_file(SPANS, state) == CONFIG
    torch.testing.assert_close(added_at(SPANS, state, (4.0, 1.1)), view.strengths(torch.tensor([[4.0, 1.1]])).detach())
    assert not added_at(SPANS, state, (7.5, 1.5)).any()
    for damaged in ({}, {**state, "lora_strengths.more": torch.ones(1)}, dict(list(state.items())[1:])):
        with pytest.raises(ValueError, match="are of another model"):
            added_at(SPANS, damaged, (4.0, 1.1))


def test_strengths_that_are_not_asked_for_are_the_files_and_others_inside_of_its_range():
    option = lambda name: f"<{name}>"  # noqa: E731
    assert chosen_strengths(SPANS, {}, "a.safetensors", option) == (7.5, 1.5)
    assert chosen_strengths(SPANS, {"image_strength": 2.0, "text_strength": 3.0}, "a", option) == (3.0, 2.0)
    with pytest.raises(ValueError, match="<text_strength> must be from 3 to 10, where a was trained, not 10.5"):
        chosen_strengths(SPANS, {"text_strength": 10.5}, "a", option)
