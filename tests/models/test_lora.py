import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from distill_core.models.denoiser import Denoiser
from distill_core.models.lora import Lora, LoraSwitch, linear_layers


class Blocks(nn.Module):
    """Three tanh layers, each run through ``run_block`` (plain or checkpointed)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x, run_block=lambda block, x: block(x)):
        for block in self.blocks:
            x = run_block(block, x)
        return x


TARGETS = [f"blocks.{i}.0" for i in range(3)]


@pytest.fixture
def toy(randomise):
    network, switch = Blocks(), LoraSwitch()
    return network, switch, randomise(Lora(network, TARGETS, 2, switch), size=1.0)


def test_a_new_path_changes_nothing(family, make_backend, batch):
    backend = make_backend(family)
    torch.testing.assert_close(
        Denoiser(backend, backend.new_lora(2))(*batch), Denoiser(backend)(*batch), rtol=0, atol=0
    )


def test_each_view_has_its_own_path(family, make_backend, batch, randomise):
    backend = make_backend(family)
    plain = Denoiser(backend)(*batch)
    first, second = (randomise(backend.new_lora(2), seed) for seed in (1, 2))
    outputs = [Denoiser(backend, path)(*batch) for path in (first, second)]
    assert not torch.allclose(outputs[0], plain) and not torch.allclose(outputs[0], outputs[1])
    assert torch.equal(Denoiser(backend)(*batch), plain)  # the teacher is as before
    assert torch.equal(Denoiser(backend, first)(*batch), outputs[0])


class Quantized(nn.Module):
    """A linear layer that is no ``nn.Linear``, as the host's quantized ones: int8 weights and a scale."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().max() / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


@pytest.mark.case("memory 5.3", "a LoRA stands beside quantized layers that are not torch's Linear")
def test_a_lora_stands_beside_layers_of_other_classes(randomise):
    network, switch = Blocks(), LoraSwitch()
    for block in network.blocks:
        block[0] = Quantized(block[0])
    assert linear_layers(network, ("blocks",)) == TARGETS
    lora, x = randomise(Lora(network, TARGETS, 2, switch), size=1.0), torch.randn(4, 6, requires_grad=True)
    plain = network(x)
    with switch.on(lora):
        changed = network(x)
    gradients = torch.autograd.grad(changed.square().sum(), [x, *lora.parameters()])
    assert not torch.allclose(plain, changed) and all(gradient.any() for gradient in gradients)


def test_the_path_adds_scale_b_a_x(toy):
    network, switch, _ = toy
    path = Lora(network, TARGETS[:1], rank=2, switch=switch, alpha=6.0)
    nn.init.normal_(path.up[0])
    x = torch.randn(4, 6)
    with switch.on(path):
        added = network.blocks[0][0](x) - nn.functional.linear(
            x, network.blocks[0][0].weight, network.blocks[0][0].bias
        )
    torch.testing.assert_close(added, 6.0 / 2 * x @ path.down[0].T @ path.up[0].T, atol=1e-5, rtol=1e-5)


def test_the_switch_nests_and_recovers_from_errors():
    switch, outer, inner = LoraSwitch(), object(), object()
    with switch.on(outer):
        with pytest.raises(RuntimeError), switch.on(inner):
            assert switch.active is inner
            raise RuntimeError
        assert switch.active is outer
        with switch.on(None):
            assert switch.active is None
    assert switch.active is None


def test_a_removed_path_is_gone(toy):
    network, switch, path = toy
    x = torch.randn(2, 6)
    with switch.on(path):
        assert not torch.allclose(network(x), Blocks()(x))
        path.remove()
        assert torch.equal(network(x), Blocks()(x))


def test_only_the_path_gets_gradients(family, make_backend, batch, randomise):
    backend = make_backend(family)
    path = randomise(backend.new_lora(2))
    Denoiser(backend, path)(*batch).square().sum().backward()
    assert all(p.grad is None for p in backend.network.parameters())
    without = {name for name, p in zip(path.targets, path.down, strict=True) if not p.grad.any()}
    # SD3's last block drops its text stream, so nothing depends on that stream's query
    assert without == ({"transformer_blocks.2.attn.add_q_proj"} if family == "sd3" else set())


def test_the_teacher_view_gives_the_path_no_gradient(make_backend, batch):
    backend = make_backend("sd3")
    path = backend.new_lora(2)
    x, sigma, cond = batch
    x = x.requires_grad_()
    Denoiser(backend)(x, sigma, cond).sum().backward()
    assert x.grad.any() and all(p.grad is None for p in path.parameters())


def gradient(network, switch, path, x, run_block):
    """The path's gradient, with the view switched off between forward and backward (as the teacher's call does)."""
    path.zero_grad()
    with switch.on(path):
        loss = network(x, run_block).square().sum()
    with switch.on(None):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in path.parameters()])


def test_checkpointing_keeps_the_view_of_the_forward(toy):
    network, switch, path = toy
    x = torch.randn(5, 6)
    plain = gradient(network, switch, path, x, lambda block, x: block(x))
    assert plain.norm() > 0.1
    torch.testing.assert_close(gradient(network, switch, path, x, switch.checkpoint), plain)


def test_checkpointing_without_the_context_function_fails(toy):
    """The negative control: the recompute sees the view that is on at the backward."""
    network, switch, path = toy
    with pytest.raises(CheckpointError):
        gradient(network, switch, path, torch.randn(5, 6), lambda b, x: checkpoint(b, x, use_reentrant=False))


def test_checkpointing_recomputes_the_teacher_with_the_path_off(toy):
    """The other direction: a teacher's forward, then a backward while the student's path is on."""
    network, switch, path = toy
    x = torch.randn(5, 6)
    grads = []
    for run_block in (lambda block, x: block(x), switch.checkpoint):
        leaf = x.clone().requires_grad_()
        loss = network(leaf, run_block).square().sum()
        with switch.on(path):
            loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_checkpointing_calls_back_after_each_block_and_marks_its_inside(toy):
    network, switch, _ = toy
    inside, returned = [], []
    network.blocks[1].register_forward_hook(lambda *_: inside.append(switch.inside_checkpoint))
    switch.after_checkpoint = lambda: returned.append(switch.inside_checkpoint)
    network(torch.randn(2, 6), switch.checkpoint)
    assert inside == [True] and returned == [False] * 3


def test_export_and_load_round_trip(toy):
    network, switch, path = toy
    state = path.export()
    assert set(state) == {f"transformer.{t}.lora_{m}.weight" for t in TARGETS for m in "AB"}
    other = Lora(network, TARGETS, 2, switch, alpha=8.0)  # another scale: the file holds the product
    other.load_export(state)
    x = torch.randn(3, 6)
    outputs = []
    for view in (path, other):
        with switch.on(view):
            outputs.append(network(x))
    torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "prefix"])
def test_a_lora_of_another_model_is_refused(toy, change):
    _, _, path = toy
    state = path.export()
    key = f"transformer.{TARGETS[1]}.lora_A.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        state["transformer.other.lora_A.weight"] = state[key]
    elif change == "shape":
        state[key] = state[key][:1]
    else:
        state = path.export("unet")
    before = copy.deepcopy(list(path.parameters()))
    with pytest.raises(ValueError, match="does not fit"):
        path.load_export(state)
    assert all(torch.equal(a, b) for a, b in zip(before, path.parameters(), strict=True))


@pytest.mark.parametrize("targets, rank", [([], 2), (TARGETS, 0), (["blocks.0.1"], 2), (["blocks.9.0"], 2)])
def test_bad_targets_and_ranks_are_refused(toy, targets, rank):
    network, switch, _ = toy
    with pytest.raises(ValueError):
        Lora(network, targets, rank, switch)


def test_linear_layers_finds_those_under_a_name(make_network):
    network = make_network("flux")
    single = linear_layers(network, ("single_transformer_blocks",))
    assert single and all(isinstance(network.get_submodule(name), nn.Linear) for name in single)
    assert {name.split(".")[0] for name in single} == {"single_transformer_blocks"}
    both = linear_layers(network, ("transformer_blocks", "single_transformer_blocks"))
    assert {name.split(".")[0] for name in both} == {"transformer_blocks", "single_transformer_blocks"}


def test_diffusers_loads_the_export_and_gives_the_same_output(family, make_backend, batch, randomise):
    backend, fresh = make_backend(family), make_backend(family)
    path = randomise(Lora(backend.network, backend.lora_targets(), 2, backend.switch, alpha=3.0))
    prefix = backend.architecture.lora_prefix
    fresh.network.load_lora_adapter(path.export(prefix), prefix=prefix)
    ours, theirs = Denoiser(backend, path)(*batch), Denoiser(fresh)(*batch)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, Denoiser(backend)(*batch), atol=1e-2)


def test_diffusers_pipeline_loads_the_exported_file(make_backend, batch, randomise, tmp_path):
    """The user's way: a safetensors file and ``pipeline.load_lora_weights``."""
    from diffusers import StableDiffusion3Pipeline
    from safetensors.torch import save_file

    backend, fresh = make_backend("sd3"), make_backend("sd3")
    path = randomise(backend.new_lora(2))
    save_file(path.export(), tmp_path / "lora.safetensors")
    absent = ("scheduler", "vae", "text_encoder", "tokenizer")
    absent += ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(transformer=fresh.network, **dict.fromkeys(absent))
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(Denoiser(fresh)(*batch), Denoiser(backend, path)(*batch), atol=1e-5, rtol=1e-5)


class Attention(nn.Module):
    """One head on [B, 4, 6]."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        q = self.linear(x).unsqueeze(1)
        return x + nn.functional.scaled_dot_product_attention(q, q, x.unsqueeze(1)).squeeze(1)


def test_checkpointing_recomputes_twice_with_the_kernels_of_the_forward():
    """A double backward recomputes again, when plain attention is no longer asked for."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        block, x = Attention(), torch.randn(2, 4, 6, requires_grad=True)
    results = []
    for run_block in (lambda block, x: block(x), LoraSwitch().checkpoint):
        with sdpa_kernel(SDPBackend.MATH):
            y = run_block(block, run_block(block, x))
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), list(block.parameters())))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)
