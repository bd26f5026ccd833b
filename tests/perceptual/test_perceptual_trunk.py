import pytest
import torch
from networks import METRIC_WIDTHS, build_trunk_state
from torch import nn

from distill_core.perceptual.trunk import FrozenTrunk, TrainableTrunk, TrunkConfig, check_latent

CONFIG = TrunkConfig(4, METRIC_WIDTHS)


def pair(dtype=torch.float64):
    state, _ = build_trunk_state(4)
    trainable = TrainableTrunk(CONFIG)
    trainable.load_state_dict(state)
    return trainable.eval().to(dtype), FrozenTrunk(CONFIG, state, dtype)


def test_the_default_is_vgg16s_layout():
    layers = TrunkConfig(16).layers()
    assert [o for _, o in layers] == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert layers[0] == (16, 64) and all(i == o for (_, o), (i, _) in zip(layers, layers[1:], strict=False))
    with torch.device("meta"):
        sizes = [tuple(t.shape[1:]) for t in TrainableTrunk(TrunkConfig(16))(torch.zeros(1, 16, 64, 64))]
    assert sizes == [(64, 64, 64), (128, 64, 64), (256, 64, 64), (512, 32, 32), (512, 16, 16)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_folding_and_the_short_backward_change_nothing(checkpointing):
    trainable, frozen = pair()
    frozen.checkpointing = checkpointing
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64, requires_grad=True)
    expected, found = trainable(x), list(frozen(x))
    g = [torch.randn_like(tap) for tap in expected]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(taps, x, g) for taps in (expected, found))
    assert ((a - b).norm() / a.norm()).item() < 1e-12


def test_it_keeps_a_byte_a_value_where_autograd_keeps_two_floats():
    def saved(trunk) -> int:
        sizes = {}
        keep = lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t  # noqa: E731
        x = torch.randn(1, 4, 32, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            taps = list(trunk(x))
        weights = {t.untyped_storage().data_ptr() for t in [*trunk.parameters(), *trunk.buffers()]}
        total = sum(size for pointer, size in sizes.items() if pointer not in weights)
        del taps
        return total

    trainable, frozen = pair(torch.float32)
    assert saved(frozen) < 0.35 * saved(trainable.requires_grad_(False))


def test_no_parent_can_train_or_save_it():
    _, frozen = pair(torch.float32)
    parent = nn.Sequential(frozen).requires_grad_(True).train()
    assert not list(parent.parameters()) and not parent.state_dict()


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 3, 8, 8), "video latent.*frames as a batch"),
        ((4, 8, 8), r"must be \[B, 4, H, W\]"),
        ((1, 16, 8, 8), "weights of the latent's own autoencoder"),
        ((1, 4, 8, 3), "at least 4 x 4"),
    ],
)
def test_wrong_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        check_latent(torch.zeros(shape), 4)


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="5 positive widths"):
        TrunkConfig(4, (8, 8))
