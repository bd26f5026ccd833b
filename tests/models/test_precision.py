"""The number format of frozen weights."""

import pytest
import torch
from torch import nn

from distill_core.models.precision import halves_to_bfloat16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).requires_grad_(False)


@pytest.mark.case("memory 5.4", "under bfloat16 autocast float16 weights are rounded once, not copied in each use")
def test_rounding_once_is_what_autocast_does_at_each_use():
    half, x = network().half(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = half[0](x), half[2](x)
        halves_to_bfloat16(half)
        after = half[0](x), half[2](x)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_other_formats_stay(dtype):
    other = network().to(dtype)
    halves_to_bfloat16(other)
    assert {value.dtype for value in other.parameters()} == {dtype}


def test_a_network_that_casts_its_inputs_follows():
    told = network().half()
    told.dtype = torch.float16
    halves_to_bfloat16(told)
    assert told.dtype == torch.bfloat16
