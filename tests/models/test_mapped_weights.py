"""Weights that the command line loads in their file's own format lie in the file: they are no anonymous memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from networks import CONFIGS, build_network

from distill_core.models.backends.diffusers_folders import load_backend


def file_of(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped from, "" for anonymous memory."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        first, last = (int(side, 16) for side in span.split("-"))
        if first <= address < last:
            return path[0] if path else ""
    raise AssertionError("a tensor without memory")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_lie_in_their_file(tmp_path, family):
    build_network(family).to(torch.bfloat16).save_pretrained(tmp_path)
    weights = [p for p in load_backend(tmp_path, torch.bfloat16).network.parameters() if p.numel() > 1000]
    assert {file_of(weight) for weight in weights} == {str(tmp_path / "diffusion_pytorch_model.safetensors")}
    other = [p for p in load_backend(tmp_path, torch.float32).network.parameters() if p.numel() > 1000]
    assert not any(file_of(weight).endswith(".safetensors") for weight in other)
