import math

import pytest
import torch
from torch import nn

from distill_core.methods.losses import (
    GAN_LOSSES,
    REGRESSIONS,
    approximate_r1,
    pseudo_huber,
    r1_on_head_inputs,
    squared_error,
)

FAKE, REAL = torch.tensor([[0.5, -2.0]]), torch.tensor([[2.0, -0.5]])


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    "name, generator, discriminator",
    [
        ("hinge", 0.75, (0 + 1.5) / 2 + (1.5 + 0) / 2),
        (
            "nonsaturating",
            (softplus(-0.5) + softplus(2.0)) / 2,
            (softplus(-2.0) + softplus(0.5)) / 2 + (softplus(0.5) + softplus(-2.0)) / 2,
        ),
        ("relativistic", softplus(1.5), softplus(-1.5)),
    ],
)
def test_values_by_hand(name, generator, discriminator):
    generator_loss, discriminator_loss = GAN_LOSSES[name]
    assert generator_loss(FAKE, REAL).item() == pytest.approx(generator)
    assert discriminator_loss(FAKE, REAL).item() == pytest.approx(discriminator)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_the_players_pull_the_fake_logits_in_opposite_directions(name):
    """Larger means more real: the generator raises fake logits, the discriminator lowers them and raises the real."""
    generator_loss, discriminator_loss = GAN_LOSSES[name]
    fake, real = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    (to_generator,) = torch.autograd.grad(generator_loss(fake, real), fake)
    of_fake, of_real = torch.autograd.grad(discriminator_loss(fake, real), [fake, real])
    assert (to_generator < 0).all() and (of_fake > 0).all() and (of_real < 0).all()


@pytest.mark.parametrize("name", ["hinge", "nonsaturating"])
def test_the_generator_needs_no_real_logits(name):
    generator_loss, _ = GAN_LOSSES[name]
    assert torch.equal(generator_loss(FAKE), generator_loss(FAKE, REAL))


def test_hinge_stops_at_the_margin():
    assert GAN_LOSSES["hinge"][1](torch.tensor([[-1.0, -5.0]]), torch.tensor([[1.0, 5.0]])) == 0


class Head(nn.Module):
    """A smooth nonlinear head on two maps: logits [B, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4).double(), nn.Linear(5, 4).double()

    def forward(self, maps):
        return torch.tanh(self.a(maps[0].flatten(1))) + self.b(maps[1].flatten(1)).square()


def head_maps(seed=1):
    g = torch.Generator().manual_seed(seed)
    shapes = ((3, 6, 1, 1), (3, 5, 1, 1))
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def r1_by_finite_differences(head, maps, h=1e-5):
    """Per item the squared norm of d(mean logit) / d(maps), one coordinate at a time."""
    total = 0.0
    with torch.no_grad():
        for m in maps:
            for index in range(m[0].numel()):
                flat = m.view(len(m), -1)
                flat[:, index] += h
                up = head(maps).mean(1)
                flat[:, index] -= 2 * h
                down = head(maps).mean(1)
                flat[:, index] += h
                total = total + ((up - down) / (2 * h)).square()
    return total.mean().item()


def test_r1_is_the_squared_gradient_norm_of_each_items_mean_logit():
    head, maps = Head(), head_maps()
    penalty = r1_on_head_inputs(head(maps), maps).item()
    assert penalty == pytest.approx(r1_by_finite_differences(head, maps), rel=1e-7)
    by_item = []
    for i in range(3):
        rows = [m[i : i + 1].detach().requires_grad_() for m in maps]
        by_item.append(sum(g.square().sum() for g in torch.autograd.grad(head(rows).mean(), rows)).item())
    assert penalty == pytest.approx(sum(by_item) / 3)


def test_r1_trains_the_heads_by_double_backward():
    head, maps = Head(), head_maps()
    r1_on_head_inputs(head(maps), maps).backward()
    for parameter in (head.a.weight, head.b.weight, head.b.bias):
        for index in range(0, parameter.numel(), 3):
            values = []
            for step in (1e-5, -2e-5, 1e-5):
                parameter.data.view(-1)[index] += step
                values.append(r1_on_head_inputs(head(maps), maps).item())
            slope = (values[0] - values[1]) / 2e-5
            assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_r1_of_a_linear_head_by_hand():
    """Mean logit (w1 + w2) . x / 2 of two logits."""
    weight = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    x = torch.randn(5, 2, requires_grad=True)
    assert r1_on_head_inputs(x @ weight.T, [x]).item() == pytest.approx(2.0**2 + 1.0**2)


@pytest.mark.case("methods B8", "approximate R1 is in the paper's unit: the squared gradient times sigma squared")
@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_approximate_r1_estimates_the_squared_gradient_of_a_linear_discriminator(sigma):
    """E (sigma grad D . n)^2 = sigma^2 ||grad D||^2."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(12, generator=g, dtype=torch.float64)
    x, noise = (torch.randn(20_000, 12, generator=g, dtype=torch.float64) for _ in range(2))
    estimate = approximate_r1((x @ weight)[:, None], ((x + sigma * noise) @ weight)[:, None])
    assert estimate.item() == pytest.approx(sigma**2 * weight.square().sum().item(), rel=0.03)


def test_approximate_r1_tends_to_the_directional_derivative_of_a_nonlinear_discriminator():
    head, maps = Head(), head_maps()
    directions = [m.detach() for m in head_maps(seed=2)]
    grads = torch.autograd.grad(head(maps).mean(1).sum(), maps)
    exact = sum((g * d).flatten(1).sum(1) for g, d in zip(grads, directions, strict=True)).square().mean().item()

    def error(sigma):
        moved = [m + sigma * d for m, d in zip(maps, directions, strict=True)]
        return abs(approximate_r1(head(maps), head(moved)).item() / (sigma**2 * exact) - 1)

    assert error(1e-6) < 1e-5 < error(1e-1)


def test_pseudo_huber_values():
    target = torch.zeros(3, 2, 8)
    prediction = torch.stack([torch.zeros(2, 8), torch.full((2, 8), 1e-4), torch.full((2, 8), 3.0)])
    c = 0.00054 * 4  # 16 elements
    expected = [0.0, (math.sqrt(16 * 1e-8 + c**2) - c) / 4, (math.sqrt(16 * 9 + c**2) - c) / 4]
    assert pseudo_huber(prediction, target).tolist() == pytest.approx(expected, rel=1e-3)
    assert expected[2] == pytest.approx(3.0, abs=1e-3)  # far away it is the root mean square


def test_pseudo_huber_has_a_finite_gradient_at_0():
    x = torch.zeros(1, 4, requires_grad=True)
    pseudo_huber(x, torch.zeros(1, 4)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 4))


def test_squared_error_is_the_mean_per_item():
    prediction = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert squared_error(prediction, torch.zeros(2, 2)).tolist() == [5.0, 0.0]


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions_are_per_item_and_float32(name):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 6, 8, generator=g) for _ in range(2))
    whole = REGRESSIONS[name](a, b)
    assert whole.shape == (3,)
    torch.testing.assert_close(REGRESSIONS[name](a[1:2], b[1:2]), whole[1:2])
    half = REGRESSIONS[name](a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.01, atol=0)
