"""Fitting a shipped model's parts: a stopped fit goes on as if it had not been stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_core.experiments import fitting


class Stopped(Exception):
    pass


def fit(steps: int, checkpoint=None, stop_at: int | None = None):
    """A small regression; returns its weights, their average and the log."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 1))
    net = net.to(memory_format=torch.channels_last)
    average = [p.detach().clone() for p in net.parameters()]
    seen = 0

    def loss_fn(generator: torch.Generator) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if stop_at is not None and seen > stop_at:
            raise Stopped
        x = torch.randn(8, 2, 5, 5, generator=generator)
        return (net(x)[:, 0] - x.mean((1, 2, 3))).square().mean()

    log = fitting.fit(list(net.parameters()), loss_fn, 1e-2, "fit", fitting.Stage(steps, 3, checkpoint), average)
    return [p.detach() for p in net.parameters()], average, log, seen


def test_a_stopped_fit_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "EVERY", 20)
    whole, average, log, _ = fit(70)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        fit(70, checkpoint, stop_at=57)
    again, average_again, _, seen = fit(70, checkpoint)
    assert seen == 30  # from step 40 on
    assert all(map(torch.equal, whole, again)) and all(map(torch.equal, average, average_again))
    assert not checkpoint.exists()
    assert log["final_loss"] < 0.1 and log["steps"] == 70


def test_the_average_lies_behind_the_weights():
    weights, average, _, _ = fit(70)
    assert not any(map(torch.equal, weights, average))
    assert all((w - a).abs().max() < 0.2 for w, a in zip(weights, average, strict=True))
