"""A turbo's own samples: where it goes, what it makes, kept through a stop and through a kill."""

from __future__ import annotations

import pytest
import torch
from toy import CHANNELS, ToyBackend, toy_conds

from distill_core.data.dataset import LatentDataset
from distill_core.data.kept import cache_kept, kept_config
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, cumulative_alphas
from distill_core.diffusion.samplers import SAMPLERS, sample
from distill_core.diffusion.schedules import explicit_sigmas, grid_sigmas
from distill_core.models.denoiser import Denoiser, Guided


def turbo(process=None, guidance: float = 1.0) -> Guided:
    backend = ToyBackend()
    backend.process = process or backend.process
    return Guided(Denoiser(backend), toy_conds()[1], guidance)


def made(folder, model, levels, sampler="renoise", count=8, **settings):
    config = kept_config(levels, count, (4, 6), **{"batch_size": 4, "shard_size": 8, **settings})
    options = {"eta": 0.6} if sampler == "ancestral" else {}
    for _ in cache_kept(model, toy_conds()[0], CHANNELS, config, folder, sampler=sampler, sampler_options=options):
        pass
    return LatentDataset(folder)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind, guidance", [("flow", 1.0), ("eps", 1.5)])
def test_it_holds_the_turbos_samples_and_the_states_on_the_way(tmp_path, sampler, kind, guidance):
    model = turbo(DiscreteProcess(cumulative_alphas()) if kind == "eps" else None, guidance)
    levels = tuple(grid_sigmas(model.process, 4)[:-1].tolist())
    dataset = made(tmp_path, model, levels, sampler, guidance=guidance)
    assert dataset.state_sigmas == pytest.approx(levels) and dataset.manifest()["guidance"] == guidance
    batch = dataset.read([(0, row) for row in range(8)])
    cond = toy_conds()[0][[i % 3 for i in range(8)]]
    options = {"eta": 0.6} if sampler == "ancestral" else {}
    grid = explicit_sigmas(levels)
    plain = {"seed": 0, "items": range(8), "purpose": "kept", "sampler": sampler, **options}
    torch.testing.assert_close(batch.latents, sample(model, model.process, grid, cond, (CHANNELS, 4, 6), **plain))
    # The first state is where sampling starts, and from each state but for new noise the path goes on to the next.
    noise = ItemNoise(0, range(8), "kept").normal(CHANNELS, 4, 6)
    sigma = torch.full((8,), levels[0])
    start = model.process.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
    torch.testing.assert_close(batch.states[:, 0], start)
    if sampler == "euler":
        for index in range(4):
            rest = SAMPLERS["euler"](model, batch.states[:, index], grid[index:], {"cond": cond}, disable=True)
            torch.testing.assert_close(rest, batch.latents, atol=1e-4, rtol=1e-4)


def test_stopped_anywhere_it_goes_on_and_grows(tmp_path):
    levels = (1.0, 0.5)
    whole = made(tmp_path / "whole", turbo(), levels, count=11)
    config = kept_config(levels, 8, (4, 6), batch_size=4, shard_size=8)
    steps = cache_kept(turbo(), toy_conds()[0], CHANNELS, config, tmp_path / "parts", sampler="renoise")
    assert next(steps)[0] == 4
    steps.close()
    parts = made(tmp_path / "parts", turbo(), levels, count=11)
    for a, b in zip(whole.files, parts.files, strict=True):
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())


@pytest.mark.parametrize("change", [{"sampler": "euler"}, {"levels": (1.0, 0.4)}, {"seed": 3}])
def test_another_turbo_is_not_mixed_in(tmp_path, change):
    made(tmp_path, turbo(), (1.0, 0.5))
    with pytest.raises(ValueError, match="holds a dataset made with other settings"):
        made(tmp_path, turbo(), **{"levels": (1.0, 0.5), **change})
