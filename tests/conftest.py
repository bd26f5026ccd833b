"""Shared fixtures: the tiny networks of networks.py as backends, and batches for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.append(str(Path(__file__).resolve().parents[1]))  # plain `pytest` finds distill_core without an installation

from networks import CONFIGS, LATENT, build_cond, build_network, randomise_path  # noqa: E402, I001

from distill_core.models.backends.diffusers import DiffusersBackend  # noqa: E402
from distill_core.models.denoiser import Cond  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads than one would fight for them
    os.environ["OMP_NUM_THREADS"] = "1"  # of what the tests start
    torch.set_num_threads(1)

settings.register_profile("repo", database=None, deadline=None)  # no files, no failures of a busy machine
settings.load_profile("repo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rows of public cases travel with a test's reports, from whichever process runs it (cases.py)."""
    for item in items:
        item.user_properties += [("case", list(mark.args)) for mark in item.iter_markers("case")]


@pytest.fixture(params=list(CONFIGS))
def family(request) -> str:
    """Runs a test once per architecture."""
    return request.param


@pytest.fixture
def make_network():
    return build_network


@pytest.fixture
def make_backend():
    """make_backend(family, process=None, gradient_checkpointing=False, **config changes)."""

    def make(family: str, process=None, gradient_checkpointing: bool = False, **changes) -> DiffusersBackend:
        return DiffusersBackend(build_network(family, **changes), process, gradient_checkpointing)

    return make


@pytest.fixture
def float64_rotary_embedding(monkeypatch):
    """diffusers rotates FLUX's queries in float32, whose rounding would drown a small finite difference."""
    from diffusers.models.transformers import transformer_flux

    def rotate(x, freqs, sequence_dim=2):
        cos, sin = (f.to(x.dtype)[None, :, None, :] for f in freqs)
        assert sequence_dim == 1
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin

    x, angle = torch.randn(1, 3, 2, 4), torch.randn(3, 2).repeat_interleave(2, 1)
    freqs = (angle.cos(), angle.sin())
    torch.testing.assert_close(rotate(x, freqs, 1), transformer_flux.apply_rotary_emb(x, freqs, sequence_dim=1))
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotate)


@pytest.fixture
def make_cond():
    return build_cond


@pytest.fixture
def randomise():
    return randomise_path


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, Cond]:
    """x [2, 4, 6, 8], sigma [2] inside every family's range, cond of 2 rows."""
    x = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(7))
    return x, torch.tensor([0.9, 0.4]), build_cond(2)
