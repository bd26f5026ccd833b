"""A LoRA on a diffusers network in NF4, its layers those that diffusers puts there (bitsandbytes' Linear4bit)."""

from __future__ import annotations

import pytest
import torch
from networks import build_network
from torch import nn

from distill_core.digests import fingerprint
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser

bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.46")  # 4 bits on a CPU


def in_nf4(backend: DiffusersBackend) -> DiffusersBackend:
    """Its blocks' linear layers quantized as diffusers does it, which wants a GPU for it."""
    for name in backend.lora_targets():
        layer = backend.network.get_submodule(name)
        kind = dict(bias=layer.bias is not None, quant_type="nf4", compute_dtype=torch.float32)
        quantized = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, **kind)
        quantized.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        quantized.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(backend.network.get_submodule(parent), child, quantized.to("cpu"))
    return backend


def in_full(backend: DiffusersBackend) -> DiffusersBackend:
    """The same weights in ordinary layers."""
    for name in backend.lora_targets():
        layer = backend.network.get_submodule(name)
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(backend.network.get_submodule(parent), child, plain)
    return backend


def gradients(backend: DiffusersBackend, batch, randomise) -> list[torch.Tensor]:
    lora = randomise(backend.new_lora(2))
    x = batch[0].clone().requires_grad_()
    out = Denoiser(backend, lora)(x, *batch[1:])
    found = torch.autograd.grad(out.square().mean(), [x, *lora.parameters()])
    return [out.detach(), found[0], torch.cat([grad.flatten() for grad in found[1:]])]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd3", "flux", "unet"])
def test_a_lora_on_nf4_has_the_gradient_of_the_weights_in_full(name, checkpointing, batch, randomise):
    backend = in_nf4(DiffusersBackend(build_network(name), gradient_checkpointing=checkpointing))
    assert len(fingerprint(backend.network)) == 16
    before = gradients(backend, batch, randomise)
    after = gradients(in_full(backend), batch, randomise)
    assert [((a - b).norm() / b.norm()).item() for a, b in zip(before, after, strict=True)] == pytest.approx(
        [0, 0, 0], abs=1e-5
    )


def test_all_weights_of_a_network_in_nf4_are_not_trained():
    with pytest.raises(ValueError, match="quantized network .* cannot be copied to be trained.* or train a LoRA"):
        in_nf4(DiffusersBackend(build_network("sd3"))).trainable_copy()
