"""Blocks whose weights wait in host memory or in a file: the same student to the last bit, and less memory."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from networks import LATENT, build_cond, randomise_path

from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.models.denoiser import Denoiser
from distill_core.training.loop import training_step
from distill_core.training.loop_config import TrainConfig
from distill_core.training.plan import Shapes
from distill_core.training.run import RunConfig, StudentConfig, assemble

METHODS = {
    "ladd": LADDConfig(warmup_steps=0),
    "diffusion2gan": Diffusion2GANConfig({"adversarial": 1.0}, critic="lora", critic_rank=4, r1=1.0),
    "dmd2": DMD2Config(fake_score_updates=2),
}
PLACES = {"ram": ("ram", True), "file": ("file", False), "file to a device": ("file", True)}  # tier, copies


def trained(make_backend, family, method, rank, place, folder) -> dict[str, torch.Tensor]:
    """Two steps of a run; its student."""
    backend = make_backend(family, gradient_checkpointing=True)
    offload = None
    if place != "none":
        tier, copies = PLACES[place]
        offload = backend.offload("cpu", tier, folder, copies)
    heads, train = DiscriminatorConfig(width=8, blocks=1), TrainConfig(batch_size=2, precision="float32")
    config = RunConfig(METHODS[method], train, StudentConfig(rank), {"base": "", "dataset": ""}, heads)
    torch.manual_seed(0)  # of the batch that the heads are fitted to
    run = assemble(config, Components(backend), Shapes(LATENT, build_cond(1)))
    for step in range(2):
        run.step = step
        torch.manual_seed(step)  # of the batch
        training_step(run)
    if offload:
        places = [module._parameters[name] is home for block in offload.homes for module, name, home in block]
        assert all(places) and len(places) > 10 and offload.runs > 2 * len(offload.homes)
        assert offload.moved > offload.size
        offload.close()
    return {name: value.detach().clone() for name, value in run.student_parameters.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_student_is_the_same_to_the_last_bit(family, make_backend, tmp_path, method):
    plain = trained(make_backend, family, method, 4, "none", tmp_path)
    for place in PLACES:
        away = trained(make_backend, family, method, 4, place, tmp_path)
        assert plain.keys() == away.keys() and all(torch.equal(plain[name], away[name]) for name in plain), place
    assert not list(tmp_path.iterdir())


def test_all_weights_can_be_trained_beside_a_frozen_teacher_that_is_away(make_backend, tmp_path):
    plain, away = (trained(make_backend, "sd3", "ladd", 0, place, tmp_path) for place in ("none", "ram"))
    assert all(torch.equal(plain[name], away[name]) for name in plain)


def test_inputs_of_blocks_in_host_memory_change_nothing(family, make_backend):
    """They come back for the recompute; a copy on the same device stands for host memory."""
    results, x, cond = [], torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0)), build_cond(2)
    kept: list[torch.Tensor] = []

    def keep_clone(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.clone())
        return kept[-1]

    for keep in (None, keep_clone):
        backend = make_backend(family, gradient_checkpointing=True)
        backend.switch.keep_inputs = keep
        lora = randomise_path(backend.new_lora(2))
        Denoiser(backend, lora)(x, torch.tensor([0.9, 0.4]), cond).square().sum().backward()
        results.append([p.grad for p in lora.parameters()])
        assert bool(kept) == bool(keep)
    for plain, away in zip(*results, strict=True):
        assert (plain is None and away is None) or torch.equal(plain, away)


def test_no_more_than_three_blocks_are_on_the_device(make_backend):
    """In a backward: the block whose gradient is computed, the one that is recomputed, and the next."""
    backend = make_backend("sd3", gradient_checkpointing=True, num_layers=9)
    offload, lora = backend.offload("cpu", "ram", copies=True), backend.new_lora(2)
    alive, peak, fetch = {}, [], offload._fetch

    def counted(index):
        arrived = fetch(index)
        for tensor in arrived:
            alive[torch.utils.weak.WeakIdRef(tensor)] = tensor.numel() * tensor.element_size()
        peak.append(sum(size for reference, size in alive.items() if reference() is not None))
        return arrived

    offload._fetch = counted
    x = torch.randn(2, *LATENT)
    Denoiser(backend, lora)(x, torch.tensor([0.9, 0.4]), build_cond(2)).square().sum().backward()
    assert 2 * offload.largest <= max(peak) <= 3 * offload.largest < offload.size


def test_a_mapped_file_is_no_anonymous_memory(make_backend, tmp_path):
    def anonymous() -> int:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    backend = make_backend("flux", attention_head_dim=32, num_attention_heads=24, num_layers=2)
    size = sum(p.numel() * 4 for p in backend.network.parameters())
    before = anonymous()
    offload = backend.offload("cpu", "file", tmp_path)
    x = torch.randn(1, *LATENT)
    with torch.no_grad():
        Denoiser(backend)(x, torch.tensor([0.9]), build_cond(1))
    assert offload.size > 0.8 * size and before - anonymous() > 0.7 * size
    offload.close()
