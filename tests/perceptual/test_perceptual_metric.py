import perceptual_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import METRIC_WIDTHS, build_metric, build_trunk_state
from torch import nn

from distill_core.diffusion.noise import ItemNoise
from distill_core.perceptual.metric import ELatentLPIPS
from distill_core.perceptual.transforms import PRESETS, draw
from distill_core.perceptual.trunk import FrozenTrunk, TrunkConfig


def latents(count=2, channels=4, height=8, width=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, channels, height, width, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def expected(a, b, seed, preset, channels):
    """Distance [B] and its gradient by the reference, float64."""
    state, heads = build_trunk_state(channels)
    a = a.double().requires_grad_()
    named = draw(ItemNoise(seed, range(len(a)))).named()
    values = []
    for i in range(len(a)):
        pair = [x[i] if preset == "none" else reference.transformed(x[i], named, i, preset) for x in (a, b.double())]
        values.append(reference.distance(pair[0][None], pair[1][None], state, heads))
    total = torch.stack(values)
    return total.detach(), torch.autograd.grad(total.sum(), a)[0]


@pytest.mark.parametrize("channels, height, width", [(4, 32, 32), (16, 27, 40)])
@pytest.mark.parametrize("preset", PRESETS)
def test_parity_with_the_description(preset, channels, height, width):
    """Value to 1e-6 in float32, value to 1e-12 and gradient to 1e-10 in float64."""
    a, b = latents(2, channels, height, width, dtype=torch.float32)
    value, gradient = expected(a, b, 1, preset, channels)
    single = build_metric(channels, preset=preset)(a, b, ItemNoise(1, range(2)))
    assert ((single - value).abs() / value).max() < 1e-6
    a = a.double().requires_grad_()
    double = build_metric(channels, torch.float64, preset=preset)(a, b.double(), ItemNoise(1, range(2)))
    (found,) = torch.autograd.grad(double.sum(), a)
    assert ((double - value).abs() / value).max() < 1e-12
    assert ((found - gradient).norm() / gradient.norm()).item() < 1e-10


def test_parity_can_fail():
    """Other draws, or one weight changed by 1 %, are far outside the tolerance."""
    a, b = latents()
    value, _ = expected(a, b, 1, "bg", 4)
    other = build_metric(preset="bg")(a, b, ItemNoise(2, range(2)))
    assert ((other - value).abs() / value).max() > 1e-4
    state, heads = build_trunk_state(4)
    state["convs.3.weight"] = state["convs.3.weight"] * 1.01
    changed = ELatentLPIPS(FrozenTrunk(TrunkConfig(4, METRIC_WIDTHS), state), heads)
    assert ((changed(a, b, ItemNoise(1, range(2))) - value).abs() / value).max() > 1e-5


sizes = st.integers(4, 13)


@settings(max_examples=25)
@given(
    preset=st.sampled_from(PRESETS),
    batch=st.sampled_from([1, 2, 17]),
    height=sizes,
    width=sizes,
    channels=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_axioms(preset, batch, height, width, channels, seed, size):
    """At least 0, finite, 0 for equal latents, symmetric; the gradient is finite and 0 at equality."""
    metric = build_metric(channels, preset=preset)
    a, b = (size * x for x in latents(batch, channels, height, width, seed % 1000))
    random = lambda: ItemNoise(seed, range(batch))  # noqa: E731
    forth, back = metric(a, b, random()), metric(b, a, random())
    assert forth.shape == (batch,) and torch.isfinite(forth).all() and (forth >= 0).all()
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=1e-9)
    same = a.clone().requires_grad_()
    zero = metric(same, a, random())
    assert torch.equal(zero, torch.zeros(batch))
    (gradient,) = torch.autograd.grad(zero.sum(), same)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_only_the_prediction_gets_a_gradient():
    a, b = (x.requires_grad_() for x in latents())
    metric = build_metric(l1=0.5)
    metric(a, b, ItemNoise(0, range(2))).sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_small_steps_against_the_gradient_lower_the_distance(checkpointing):
    a, b = latents()
    metric = build_metric(preset="none")
    metric.trunk.checkpointing = checkpointing
    a.requires_grad_()
    before = metric(a, b)
    (g,) = torch.autograd.grad(before.sum(), a)
    with torch.no_grad():
        after = metric(a - 1e-2 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1), b)
    assert (after < before).all()


def test_an_item_does_not_depend_on_its_batch():
    a, b = latents(5)
    metric = build_metric(preset="bgco")
    whole = metric(a, b, ItemNoise(3, range(5)))
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1], ItemNoise(3, [i])) for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=5e-6, atol=0)


def test_several_draws_are_averaged():
    a, b = latents()
    random, one = ItemNoise(0, range(2)), build_metric()
    by_hand = torch.stack([one(a, b, random) for _ in range(3)])
    assert by_hand.std(0).min() > 0
    torch.testing.assert_close(build_metric(draws=3)(a, b, ItemNoise(0, range(2))), by_hand.mean(0))


def test_the_l1_term_is_apart_and_of_the_untransformed_latents():
    a, b = latents()
    terms = build_metric().terms(a, b, ItemNoise(0, range(2)))
    torch.testing.assert_close(terms["l1"], (a - b).abs().mean((1, 2, 3)))
    with_l1 = build_metric(l1=0.5)(a, b, ItemNoise(0, range(2)))
    torch.testing.assert_close(with_l1, terms["perceptual"] + 0.5 * terms["l1"])
    torch.testing.assert_close(build_metric()(a, b, ItemNoise(0, range(2))), terms["perceptual"])


def test_it_is_frozen_in_eval_mode_whatever_the_parent_does():
    metric = build_metric()
    parent = nn.ModuleDict({"metric": metric, "student": nn.Linear(2, 2)})
    a, b = latents()
    before = metric(a, b, ItemNoise(0, range(2)))
    parent.train().requires_grad_(True)
    assert not metric.training and not list(metric.parameters())
    assert set(parent.state_dict()) == {"student.weight", "student.bias"}
    assert torch.equal(metric(a, b, ItemNoise(0, range(2))), before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_half_precision_by_autocast_and_by_input(dtype, tolerance):
    a, b = latents()
    metric = build_metric()
    exact = metric(a, b, ItemNoise(0, range(2)))
    x = a.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = metric(x, b, ItemNoise(0, range(2)))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.dtype == torch.float32 and gradient.dtype == torch.float32 and torch.isfinite(gradient).all()
    torch.testing.assert_close(value, exact, rtol=tolerance, atol=0)
    half = a.to(dtype).requires_grad_()
    value = metric(half, b.to(dtype), ItemNoise(0, range(2)))
    (gradient,) = torch.autograd.grad(value.sum(), half)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, exact, rtol=tolerance, atol=0)


def test_the_heat_map_shows_where_they_differ():
    a, _ = latents(1, height=16, width=24)
    b = a.clone()
    b[..., 2:5, 18:22] += 1.0
    metric = build_metric(preset="none")
    found = metric.heat_map(a, b)
    assert found.shape == (1, 1, 16, 24) and (found >= 0).all()
    assert found[..., :8, 12:].mean() > 3 * found[..., 8:, :12].mean()
    assert found.mean().item() == pytest.approx(metric(a, b).item(), rel=0.05)


def test_the_dump_is_enough_to_compute_everything_again():
    a, b = latents(dtype=torch.float64)
    metric = build_metric(dtype=torch.float64, preset="bgco")
    found = metric.dump(a, b, ItemNoise(4, range(2)))
    torch.testing.assert_close(found["distance"], metric(a, b, ItemNoise(4, range(2))))
    draws = {name.removeprefix("draws."): value for name, value in found.items() if name.startswith("draws.")}
    state, heads = build_trunk_state(4)
    for side in ("prediction", "target"):
        again = torch.stack([reference.transformed(found[side][i], draws, i, "bgco") for i in range(2)])
        torch.testing.assert_close(found[f"transformed.{side}"], again)
        for i, tap in enumerate(reference.taps(again, state)):
            torch.testing.assert_close(found[f"tap{i}.{side}"], tap)
    for i in range(2):
        torch.testing.assert_close(found["matrix"][i], reference.affine(draws, i, 8, 8, "bgco"))
    by_tap = sum(found[f"distance{i}"] for i in range(5))
    torch.testing.assert_close(by_tap, found["distance"])
    torch.testing.assert_close(found["gradient"], expected(a, b, 4, "bgco", 4)[1])


def test_mistakes_are_named():
    a, b = latents()
    metric = build_metric()
    for call, message in (
        (lambda: metric(a, b), "need `random`"),
        (lambda: metric(a, b, ItemNoise(0, range(3))), "3 items were given for a batch of 2"),
        (lambda: metric(a, b[..., :7], ItemNoise(0, range(2))), "differ in shape"),
        (lambda: metric(a[:, :, None], b[:, :, None], ItemNoise(0, range(2))), "video latent"),
        (lambda: build_metric(preset="gb"), "preset must be one of"),
        (lambda: build_metric(draws=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    state, heads = build_trunk_state(4)
    trunk = FrozenTrunk(TrunkConfig(4, METRIC_WIDTHS), state)
    with pytest.raises(ValueError, match="negative weight"):
        ELatentLPIPS(trunk, [-head for head in heads])
    with pytest.raises(ValueError, match="do not fit"):
        ELatentLPIPS(trunk, heads[:4])


def test_latents_of_the_autoencoder_are_scaled_as_diffusion_models_see_them():
    metric = build_metric(scale=1.5305, shift=0.0609)
    z = torch.tensor([0.0609, 1.0609])
    torch.testing.assert_close(metric.from_autoencoder(z), torch.tensor([0.0, 1.5305]))
