import json
import math
import sys

import pytest
import torch
from toy import cache_toy, toy_run

from distill_core.files import load_tensors, save_tensors
from distill_core.models.lora import LoraConfig
from distill_core.training.loop import train
from distill_core.training.loop_config import TrainConfig
from distill_core.training.optimizers import (
    OPTIMIZERS,
    averaged,
    in_float32,
    new_optimizer,
    optimizer_state,
    rate_factor,
    rounded_at_random,
)

SETTINGS = {"betas": (0.0, 0.99), "eps": 1e-8, "weight_decay": 0.0}
RATES = {"adamw": 1e-2, "adamw8bit": 1e-2, "adafactor": 0.3, "prodigy": 1.0, "schedulefree": 3e-2}
NAMES = list(OPTIMIZERS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def state_of(run) -> dict[str, torch.Tensor]:
    """Everything a run carries from step to step, numbers of the optimizers as tensors."""
    state = {f"ema.{name}": value.clone() for name, value in run.ema.items()}
    for player in run.players:
        state |= {f"{player.name}.{name}": value.detach().clone() for name, value in player.parameters.items()}
        tensors, rest = optimizer_state(run.optimizers[player.name], player.parameters)
        state |= {f"{player.name}.state.{name}": value for name, value in tensors.items()}
        state[f"{player.name}.rest"] = torch.tensor(list(json.dumps(rest, sort_keys=True).encode()))
    return state


def differing(a, b) -> list[str]:
    first, second = state_of(a), state_of(b)
    return sorted(first.keys() ^ second.keys()) + [n for n in first if not torch.equal(first[n], second[n])]


def finish(run):
    for _ in train(run):
        pass
    return run


@pytest.mark.parametrize("rank", [2, 0], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_resumes_bit_equal(dataset, tmp_path, name, rank):
    """Stopped at 2 of 6 steps: weights, average, moments, and what belongs to no weight (d of Prodigy) end the same."""
    changes = dict(optimizer=name, discriminator_optimizer=name, student_lr=RATES[name], rank=rank)
    changes |= {"discriminator_lr": RATES[name]}
    whole = finish(toy_run(dataset, **changes))
    for event in train(toy_run(dataset, tmp_path, **changes)):
        if event.step == 2:
            break
    resumed = toy_run(dataset, tmp_path, **changes)
    assert [event.step for event in train(resumed)] == [3, 4, 5, 6]
    assert differing(resumed, whole) == []
    assert differing(finish(toy_run(dataset, **{**changes, "student_lr": RATES[name] * 1.01})), whole)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_finds_a_minimum(name):
    """A quadratic of 64 x 80 weights (large enough for 8-bit moments): the distance to its minimum falls to a fifth."""
    weight = torch.nn.Parameter(torch.randn(64, 80, generator=torch.Generator().manual_seed(0)))
    optimizer = new_optimizer(name, [{"params": [weight], "lr_scale": 1.0}], RATES[name], SETTINGS)
    before = weight.detach().norm()
    for _ in range(300):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert averaged(optimizer, weight).norm() < 0.2 * before


def test_8_bit_moments_take_a_quarter_of_the_memory():
    weight = torch.nn.Parameter(torch.ones(256, 256))
    size = {}
    for name in ("adamw", "adamw8bit"):
        optimizer = new_optimizer(name, [{"params": [weight], "lr_scale": 1.0}], 1e-3, SETTINGS)
        weight.square().sum().backward()
        optimizer.step()
        tensors, _ = optimizer_state(optimizer, {"w": weight})
        size[name] = sum(value.numel() * value.element_size() for value in tensors.values())
    print(size)
    assert size["adamw8bit"] < 0.3 * size["adamw"]


def test_random_rounding_is_right_on_average():
    """Between two neighbours of bfloat16, as often up as the way up is short; what needs no rounding stays."""
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9):
        for low, step in ((1.0, 2**-7), (-1.0, -(2**-7)), (3e-20, 2**-72)):
            low = float(torch.tensor(low).bfloat16())
            found = rounded_at_random(torch.full((20000,), low + share * step), generator).double()
            assert set(found.tolist()) <= {low, low + step}
            assert found.mean().item() == pytest.approx(low + share * step, abs=0.02 * abs(step))
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded_at_random(exact.float(), generator), exact)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_updates_too_small_for_bfloat16_add_up(name):
    """100 steps of 1e-4 on weights of 1, whose neighbours are 0.004 away; to the nearest, none would ever move."""
    weight = torch.nn.Parameter(torch.ones(128, 64, dtype=torch.bfloat16))
    optimizer = new_optimizer(name, [{"params": [weight], "lr_scale": 1.0}], 1e-4, SETTINGS)
    for step in range(100):
        weight.grad = torch.ones_like(weight)
        with in_float32([weight], torch.Generator().manual_seed(step)):
            optimizer.step()
        assert weight.dtype == weight.grad.dtype == torch.bfloat16
    assert weight.float().mean().item() == pytest.approx(0.99, abs=1e-3)
    assert torch.ones(1).bfloat16() - 1e-4 == 1


def test_a_lora_in_bfloat16_resumes_bit_equal(dataset, tmp_path):
    """Its rounding is drawn anew at each step, from the seed and the number of the step."""
    lora = LoraConfig(lora_dtype="bfloat16")
    runs = [toy_run(dataset, folder, rank=2, student_lr=1e-2) for folder in (None, tmp_path, tmp_path)]
    for run in runs:
        run.method.student.lora.configure(lora)
    for event in train(runs[1]):
        if event.step == 2:
            break
    whole, _, resumed = finish(runs[0]), runs[1], finish(runs[2])
    assert differing(whole, resumed) == []
    assert all(value.dtype == torch.bfloat16 for value in whole.student_parameters.values())
    assert all(value.dtype == torch.float32 for value in whole.ema.values())


def test_prodigy_keeps_its_estimate_and_schedule_free_its_sums_in_the_checkpoint(dataset, tmp_path):
    for name, key in (("prodigy", "d_numerator"), ("schedulefree", "weight_sum")):
        run = finish(toy_run(dataset, tmp_path / name, optimizer=name, student_lr=RATES[name]))
        _, metadata = load_tensors(run.checkpoint)
        saved = json.loads(metadata["run"])["optimizers"]["generator"]["groups"][0][key]
        assert saved == run.optimizers["generator"].param_groups[0][key] > 0
        assert saved != toy_run(dataset, optimizer=name).optimizers["generator"].param_groups[0][key]


def test_what_is_saved_of_schedule_free_is_its_average(dataset):
    """With ema_decay 0 the student's file holds x exactly as the package itself switches to it for evaluation."""
    run = finish(toy_run(dataset, optimizer="schedulefree", ema_decay=0.0, student_lr=3e-2))
    optimizer, trained = run.optimizers["generator"], {n: v.detach().clone() for n, v in run.student_parameters.items()}
    with run.ema_weights():
        sampled = {name: value.detach().clone() for name, value in run.student_parameters.items()}
    assert all(torch.equal(value, trained[name]) for name, value in run.student_parameters.items())
    optimizer.eval()
    for name, value in run.student_parameters.items():
        torch.testing.assert_close(sampled[name], value.detach())
        assert not torch.equal(sampled[name], trained[name])


def test_a_checkpoint_of_before_optimizers_could_be_chosen_goes_on(dataset, tmp_path):
    """Version 0.2 wrote neither the names of the optimizers nor their groups."""
    whole = finish(toy_run(dataset))
    for event in train(toy_run(dataset, tmp_path)):
        if event.step == 2:
            break
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = load_tensors(path)
    state = json.loads(metadata["run"])
    assert "optimizer" not in state["settings"] and state.pop("optimizers")
    save_tensors(path, tensors, {"run": json.dumps(state)})
    assert differing(finish(toy_run(dataset, tmp_path)), whole) == []


def test_another_optimizer_or_schedule_is_another_run(dataset, tmp_path):
    finish(toy_run(dataset, tmp_path))
    for changes in ({"optimizer": "adafactor"}, {"discriminator_optimizer": "adafactor"}, {"lr_schedule": "cosine"}):
        with pytest.raises(ValueError, match=f"other settings .*{next(iter(changes))}"):
            toy_run(dataset, tmp_path, **changes).resume()


@pytest.mark.parametrize(
    "name, package", [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")]
)
def test_a_missing_package_is_named_with_its_cure(dataset, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    toy_run(dataset)  # who does not choose it does not need it
    with pytest.raises(
        ValueError, match=f'"{name}" needs the package {package}: install it with `pip install {package}`'
    ):
        toy_run(dataset, optimizer=name)


def test_prodigy_refuses_what_it_cannot_train(dataset):
    with pytest.raises(ValueError, match="rate above 0"):
        toy_run(dataset, optimizer="prodigy", student_lr=0.0)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": scale} for scale in (1.0, 0.5)]
    with pytest.raises(ValueError, match="different rates"):
        new_optimizer("prodigy", groups, 1.0, SETTINGS)


# Schedules


def test_the_linear_schedule_is_the_one_of_before_to_the_last_bit():
    config = TrainConfig(steps=137, warmup_steps=7, decay_from=0.7)
    for step in range(config.steps):
        before = min(1.0, (step + 1) / 7, (137 - step) / max(1.0, (1 - 0.7) * 137))
        assert config.lr_scale(step) == before


def test_the_shapes_of_the_schedules():
    at = {
        name: [rate_factor(name, step, 100, 10, 0.0) for step in (0, 9, 25, 50, 75, 99)]
        for name in ("linear", "cosine", "constant")
    }
    assert at["linear"] == pytest.approx([0.1, 0.91, 0.75, 0.5, 0.25, 0.01])
    cosine = [(1 + math.cos(math.pi * part)) / 2 for part in (0.25, 0.5, 0.75, 0.99)]
    assert at["cosine"][2:] == pytest.approx(cosine) and at["cosine"][0] == 0.1
    assert at["constant"] == [0.1, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [rate_factor("cosine", step, 100, 0, 0.7) for step in (0, 69, 70)] == [1.0, 1.0, 1.0]
    assert rate_factor("cosine", 85, 100, 0, 0.7) == pytest.approx(0.5)


def test_schedule_free_keeps_its_rate_whatever_the_schedule(dataset):
    config = TrainConfig(steps=100, optimizer="schedulefree", lr_schedule="cosine")
    assert config.lr_scale(99, "schedulefree") == 1.0 and config.lr_scale(99) < 0.01
    run = finish(toy_run(dataset, optimizer="schedulefree", steps=20))
    rates = {player.name: run.optimizers[player.name].param_groups[0]["lr"] for player in run.players}
    assert rates["generator"] == run.config.student_lr and rates["discriminator"] < 0.2 * run.config.discriminator_lr


@pytest.mark.parametrize("field", ["optimizer", "discriminator_optimizer", "lr_schedule"])
def test_an_unknown_name_is_refused_with_the_known_ones(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*, not 'lion'"):
        TrainConfig(**{field: "lion"})


@pytest.mark.case("training 17", "a rate above 0.01 is questioned, as is 0, and one below 0.1 for Prodigy")
def test_odd_learning_rates_are_questioned():
    assert TrainConfig().questions() == []
    for rate in (1.0, 100.0):
        (said,) = TrainConfig(student_lr=rate).questions()
        assert said.startswith(f"student_lr is {rate:g}: above 0.01")
    assert "nothing is learnt" in TrainConfig(discriminator_lr=0.0).questions()[0]
    assert TrainConfig(student_lr=1.0, optimizer="prodigy").questions() == []
    assert "usually 1" in TrainConfig(student_lr=1e-4, optimizer="prodigy").questions()[0]
