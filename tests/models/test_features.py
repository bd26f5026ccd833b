import pytest
import torch
from networks import build_network
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser
from distill_core.models.features import OutOfPlace, collect_taps, tokens_to_map
from distill_core.models.lora import LoraSwitch


def image_stream(output):
    """What a block hands on for the image: UNet blocks (hidden, residuals), two-stream blocks (text, image)."""
    if isinstance(output, tuple):
        return output[0] if output[0] is not None and output[0].ndim == 4 else output[1]
    return output


def hooked(network, names, forward):
    """Outputs of the named modules in a plain forward to the end."""
    seen = {}

    def record(name):
        def hook(module, args, output):
            seen[name] = image_stream(output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(record(name)) for name in names]
    forward()
    for handle in handles:
        handle.remove()
    return [seen[n] for n in names]


def as_map(out, height, width):
    if out.ndim == 4:
        return out
    return torch.stack([out[:, i] for i in range(height * width)], -1).reshape(len(out), -1, height, width)


checkpointed = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])


@checkpointed
def test_taps_are_the_outputs_of_a_plain_forward(family, make_backend, batch, checkpointing):
    backend = make_backend(family, gradient_checkpointing=checkpointing)
    teacher, taps = Denoiser(backend), backend.tap_names
    expected = hooked(backend.network, taps, lambda: teacher(*batch))
    maps = teacher.features(*batch, taps)
    assert len(maps) == len(taps) >= 3
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, as_map(want, 3, 4), rtol=0, atol=0)


def test_maps_keep_the_layout_of_a_non_square_latent(family, make_backend, batch):
    backend = make_backend(family)
    shapes = [m.shape[2:] for m in Denoiser(backend).features(*batch, backend.tap_names)]
    if family == "unet":
        assert shapes == [(3, 4), (3, 4), (3, 4), (6, 8), (6, 8)]
    else:
        assert set(shapes) == {(3, 4)}


def test_a_token_is_as_large_as_the_network_says(batch):
    network = DiffusersBackend(build_network("sd3", patch_size=1, pos_embed_max_size=16))
    x, sigma, cond = batch
    changed = x.clone()
    changed[:, :, 0, 7] += 3
    before, after = (Denoiser(network).features(z, sigma, cond, network.tap_names[:1])[0] for z in (x, changed))
    assert before.shape[2:] == (6, 8)
    assert (after - before).square().sum(1).mean(0).argmax() == 7


def test_a_corner_of_the_latent_moves_the_same_corner_of_the_map_most(family, make_backend, batch):
    """Catches a transposed grid: the latent is 6 x 8, the map 3 x 4."""
    backend = make_backend(family)
    x, sigma, cond = batch
    changed = x.clone()
    changed[:, :, 0:2, 6:8] += 3
    tap = backend.tap_names[:1]
    before, after = (Denoiser(backend).features(z, sigma, cond, tap)[0] for z in (x, changed))
    moved = (after - before).square().sum(1).mean(0)
    assert moved.argmax() == 3  # row 0, column 3


@checkpointed
def test_the_forward_ends_after_the_last_tap(family, make_backend, batch, checkpointing):
    backend = make_backend(family, gradient_checkpointing=checkpointing)
    names, ran = backend.tap_names, []
    for name in names:
        backend.network.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    Denoiser(backend).features(*batch, names[:2])
    assert ran == names[:2]
    ran.clear()
    Denoiser(backend)(*batch)  # the next full forward is not cut short
    assert ran == names


@checkpointed
def test_an_early_exit_keeps_the_gradient(family, make_backend, batch, checkpointing):
    """The gradient of a tap by the input is that of a forward to the end."""
    x, sigma, cond = batch
    reference = make_backend(family)
    tap = reference.tap_names[1:2]
    grads = []
    for backend, features in (
        (reference, lambda d, z: [as_map(o, 3, 4) for o in hooked(reference.network, tap, lambda: d(z, sigma, cond))]),
        (make_backend(family, gradient_checkpointing=checkpointing), lambda d, z: d.features(z, sigma, cond, tap)),
    ):
        leaf = x.clone().requires_grad_()
        features(Denoiser(backend), leaf)[0].square().mean().backward()
        grads.append(leaf.grad)
    assert grads[0].norm() > 1e-3
    torch.testing.assert_close(grads[1], grads[0])


def test_a_tap_inside_a_checkpointed_block_lets_the_block_finish(make_backend, batch):
    """So that the recompute saves what the forward saved, even when it may not stop early."""
    x, sigma, cond = batch
    grads, finished = [], []
    for checkpointing in (False, True):
        backend, leaf = make_backend("sd3", gradient_checkpointing=checkpointing), x.clone().requires_grad_()
        for i in range(3):
            backend.network.transformer_blocks[i].register_forward_hook(lambda *_, i=i: finished.append(i))
        with set_checkpoint_early_stop(False):
            (tap,) = Denoiser(backend).features(leaf, sigma, cond, ["transformer_blocks.1.ff"])
            assert finished == ([0, 1] if checkpointing else [0])
            tap.square().mean().backward()
        grads.append(leaf.grad)
        finished.clear()
    torch.testing.assert_close(grads[1], grads[0])


def test_unknown_and_empty_taps_are_refused(make_backend, batch):
    backend = make_backend("sd3")
    for taps in (["transformer_blocks.99"], []):
        with pytest.raises(ValueError, match="no such module"):
            Denoiser(backend).features(*batch, taps)


def test_a_tap_that_never_runs_is_an_error_and_leaves_no_hooks():
    network, switch = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), LoraSwitch()
    with pytest.raises(ValueError, match="never ran.*b"):
        collect_taps(network, ["a", "b"], lambda: network["a"](torch.ones(1, 2)), switch)
    assert switch.after_checkpoint is None
    assert not any(module._forward_hooks for module in network.modules())


def test_tokens_to_map_drops_text_and_keeps_rows_and_columns():
    tokens = torch.arange(2 * 8 * 3).reshape(2, 8, 3)
    maps = tokens_to_map(tokens, 2, 3, text_tokens=2)
    assert maps.shape == (2, 3, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(maps[:, :, row, column], tokens[:, 2 + 3 * row + column])


class Residual(nn.Module):
    """A stack of residual blocks; ``in_place`` updates the stream as ComfyUI's FLUX does (`img += ...`)."""

    def __init__(self, in_place, run_block=lambda block, x: block(x)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inlet = nn.Linear(4, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.taps = nn.ModuleList(nn.Identity() for _ in range(3))
        self.in_place, self.run_block = in_place, run_block

    def step(self, layer, x):
        if not self.in_place:
            return (x + torch.tanh(layer(x))) * 1.5 - 0.25 * x
        before = x.clone()
        x += torch.tanh(layer(x))
        x *= 1.5
        x -= 0.25 * before
        return x

    def forward(self, x):
        x = self.inlet(x)
        for layer, tap in zip(self.blocks, self.taps, strict=True):
            x = tap(self.run_block(lambda x, layer=layer: self.step(layer, x), x))
        return x


TAPS = ["taps.0", "taps.1", "taps.2"]


def taps_and_gradient(network, x):
    leaf = x.clone().requires_grad_()
    taps = collect_taps(network, TAPS, lambda: network(leaf), LoraSwitch())
    loss = sum((i + 1) * tap.square().sum() for i, tap in enumerate(taps))
    return taps, torch.autograd.grad(loss, leaf)[0]


def out_of_place(block, x):
    with OutOfPlace():
        return block(x)


def out_of_place_checkpoint(block, x):
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (OutOfPlace(), OutOfPlace()))


@pytest.mark.parametrize("run_block", [out_of_place, out_of_place_checkpoint], ids=["plain", "checkpointed"])
def test_out_of_place_gives_separate_taps_and_right_gradients(run_block):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    taps, grad = taps_and_gradient(Residual(in_place=True, run_block=run_block), x)
    expected_taps, expected_grad = taps_and_gradient(Residual(in_place=False), x)
    for got, want in zip(taps, expected_taps, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, expected_grad)


def test_without_the_guard_in_place_taps_share_one_buffer():
    """The negative control of the test above."""
    network = Residual(in_place=True)
    taps = collect_taps(network, TAPS, lambda: network(torch.randn(2, 4)), LoraSwitch())
    assert taps[0].data_ptr() == taps[2].data_ptr() and torch.equal(taps[0], taps[2])


def test_out_of_place_covers_the_methods_as_well():
    x = torch.ones(3)
    with OutOfPlace():
        assert x.add_(1).tolist() == [2] * 3 and x.sub_(1).tolist() == [0] * 3 and x.mul_(5).tolist() == [5] * 3
    assert x.tolist() == [1] * 3
    assert x.add_(1) is x  # and outside nothing has changed
