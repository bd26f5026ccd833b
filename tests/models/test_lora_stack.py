"""LoRAs under a student: in the weights, named in its file, joined with it; and a training adapter over it."""

from __future__ import annotations

import pytest
import torch
from toy import ToyBackend, cache_toy, toy_method

from distill_core.diffusion.noise import ItemNoise
from distill_core.files import load_tensors, save_tensors
from distill_core.lora_files import save_lora
from distill_core.methods.adapter import AdapterConfig
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser
from distill_core.models.lora_stack import joined
from distill_core.models.mini import mini_backend, mini_conditioning
from distill_core.training.loop import Run, TrainConfig, train


def inputs():
    cond, _ = mini_conditioning()
    return ItemNoise(0, range(3)).normal(*mini.LATENT_SHAPE), torch.tensor([1.0, 0.5, 0.25]), cond[[0, 4, 8]]


def test_in_the_weights_it_does_what_it_does_beside_them():
    state, _ = load_tensors(mini.ASSETS / "student.safetensors")
    beside = mini_backend()
    expected = Denoiser(beside, beside.open_lora(state))(*inputs())
    backend = mini_backend()
    plain, base = Denoiser(backend)(*inputs()), backend.description()["base"]
    backend.put_below("mini")
    torch.testing.assert_close(Denoiser(backend)(*inputs()), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
    said = backend.description()
    assert said["base"] == base == beside.description()["base"] and "below" not in beside.description()
    assert [(lora["name"], lora["strength"]) for lora in said["below"]] == [("student.safetensors", 1.0)]


def test_joined_it_is_one_file_for_the_base(tmp_path):
    """Also where the student has layers that the turbo has not, and the other way round."""
    backend = mini_backend()
    backend.put_below("mini")
    layers = backend.below[0].parts
    targets = [*list(layers)[3:], *[name for name in backend.lora_targets() if name not in layers][:2]]
    lora = backend.new_lora(2, targets)
    for up in lora.up:
        torch.nn.init.normal_(up, std=0.02)
    expected = Denoiser(backend, lora)(*inputs())
    state = joined(lora.export("transformer"), backend.below, "transformer")
    save_lora(tmp_path / "one.safetensors", state, {"sigmas": [1.0]})
    fresh = mini_backend()
    fresh.put_below(str(tmp_path / "one.safetensors"))
    torch.testing.assert_close(Denoiser(fresh)(*inputs()), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"transformer.nowhere.lora_A.weight": (2, 4), "transformer.nowhere.lora_B.weight": (4, 2)}, "1 layers that"),
        ({"transformer.transformer_blocks.0.attn.to_q.lokr_w1": (2, 2)}, "is no matrix of a LoRA"),
        (
            {
                f"transformer.transformer_blocks.0.attn.to_q.lora_{m}.weight": s
                for m, s in (("A", (2, 9)), ("B", (5, 2)))
            },
            "a LoRA of another model: layer transformer_blocks.0.attn.to_q",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(tmp_path, tensors, words):
    save_tensors(tmp_path / "strange.safetensors", {name: torch.ones(shape) for name, shape in tensors.items()})
    backend = mini_backend()
    before = [value.clone() for value in backend.network.parameters()]
    with pytest.raises(ValueError, match=words):
        backend.put_below(str(tmp_path / "strange.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(before, backend.network.parameters(), strict=True))


# A training adapter


@pytest.fixture
def over(tmp_path):
    """(run, the adapter's LoRA) of a student whose training has an adapter on."""
    dataset = cache_toy(tmp_path / "data")
    method = toy_method(dataset, AdapterConfig())
    adapter = method.student.backend.new_lora(3).requires_grad_(False)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.3)
    method.student.lora.over = (adapter,)
    method.student.lora.dropout = 0.5
    return Run(method, dataset, TrainConfig(steps=3, batch_size=4, student_lr=1e-2)), adapter


def test_an_adapter_is_on_in_training_and_off_when_the_student_is_used(over):
    run, adapter = over
    batch, random = run.batch(0)
    student, frozen = run.method.student, Denoiser(run.method.student.backend)
    x, sigma = batch.latents, torch.full((4,), 0.5)
    both, teacher = student(x, sigma, batch.cond), frozen(x, sigma, batch.cond)
    alone = ToyBackend()
    with torch.no_grad():
        for lora in (student.lora, adapter):  # both in the weights
            for name, down, up in zip(lora.targets, lora.down, lora.up, strict=True):
                alone.network.get_parameter(f"{name}.weight").add_(up @ down * lora.scale)
    torch.testing.assert_close(both, Denoiser(alone)(x, sigma, batch.cond), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(teacher, Denoiser(ToyBackend())(x, sigma, batch.cond))
    with run.ema_weights():
        used = student(x, sigma, batch.cond)
    student.lora.over = ()
    torch.testing.assert_close(used, student(x, sigma, batch.cond))
    assert not torch.allclose(used, both, atol=1e-3)


def test_an_adapter_is_not_trained_and_sees_no_dropout(over):
    run, adapter = over
    before = [value.clone() for value in adapter.parameters()]
    assert not {id(p) for p in adapter.parameters()} & {id(p) for p in run.student_parameters.values()}
    seen = []
    batch, random = run.batch(0)
    with run.method.student.lora.dropping(random):
        run.method.student.backend.switch.dropout = type(
            "Count", (), {"__call__": lambda self, layer, x: seen.append(layer) or x}
        )()
        run.method.student(batch.latents, torch.full((4,), 0.5), batch.cond)
    assert sorted(seen) == sorted(run.method.student.lora.targets)
    for _ in train(run):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
