"""Diffusion-DPO: its loss by hand and by differences, what a pair shares, the reference, and a run that learns."""

from __future__ import annotations

import math

import pytest
import torch
from networks import build_cond, build_network
from scipy.stats import kstest, uniform
from toy import CHANNELS, LEVELS, ToyBackend, cache_toy, toy_conds, toy_method, toy_parts, toy_run

from distill_core.data.cache import CacheConfig
from distill_core.data.dataset import Batch, LatentDataset
from distill_core.data.preference import PreferenceConfig, cache_pairs
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.files import load_tensors
from distill_core.methods.components import Components
from distill_core.methods.dpo import ALL, DPO, STUDENT, DPOConfig
from distill_core.methods.registry import new_method
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Cond, Denoiser, Guided
from distill_core.training.loop import TrainConfig, train
from distill_core.training.preflight import gradient_faults, start_faults, view_faults
from distill_core.training.run import RunConfig, StudentConfig, new_run, student_of
from distill_core.training.validation import Validation

PROCESSES = {
    "flow": FlowProcess(),
    "eps": DiscreteProcess(cumulative_alphas()),
    "v": DiscreteProcess(cumulative_alphas(), "v"),
}


def brightness(latents, items):
    return latents.mean((1, 2, 3)).double()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Pairs of the toy teacher's samples, of which the brighter was preferred."""
    folder, (cond, empty) = tmp_path_factory.mktemp("pairs"), toy_conds()
    config = CacheConfig(count=24, steps=2, guidance=2.0, sizes=((4, 6),), shard_size=8, batch_size=8)
    teacher = Guided(Denoiser(ToyBackend()), empty, 2.0)
    for _ in cache_pairs(teacher, cond, CHANNELS, config, PreferenceConfig(4), brightness, folder, {}):
        pass
    return LatentDataset(folder)


def started(dataset, config=DPOConfig(), process=None, size: int = 8, seed: int = 3):
    parts = toy_parts()
    parts.backend.process = process or parts.backend.process
    method = toy_method(dataset, config, parts=parts)
    return method, method.start(dataset.batch(0, size, 0), ItemNoise(seed, range(size)), 0)


class Answers(Denoiser):
    """A view whose answer is the same number everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__(ToyBackend())
        self.value = value

    def __call__(self, x, sigma, cond):
        return torch.full_like(x, self.value, requires_grad=True)


# The loss


def test_the_loss_by_hand_on_tiny_numbers():
    """Chosen latents are 1 and 2, rejected 0 and 4; the student answers .9, the reference .5. The mean over the pairs
    is outside the logarithm of the sigmoid."""
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    whole = lambda values: values.view(2, 1, 1, 1).expand(2, 1, 2, 2).clone()  # noqa: E731
    batch = Batch(whole(chosen), Cond(torch.zeros(2, 1, 1)), beside={"rejected": whole(rejected)})
    config = DPOConfig(beta=0.6, preference_levels=STUDENT, student_sigmas=(0.5,))
    method = DPO(Answers(0.9), Answers(0.5), config)
    step = method.start(batch, ItemNoise(0, range(2)), 0)
    loss, logs = method.generator_loss(step)

    # e = (answer - latent)^2 / sigma^2, sigma = .5
    first = (0.1**2 - 0.9**2) - (0.5**2 - 0.5**2)  # (e(S, w) - e(S, l)) - (e(R, w) - e(R, l)), in units of 4
    second = (1.1**2 - 3.1**2) - (1.5**2 - 3.5**2)
    inside = [-0.6 / 2 * 4 * value for value in (first, second)]
    assert step.inside.tolist() == pytest.approx(inside, rel=1e-5) and inside[0] > 0 > inside[1]
    expected = sum(math.log(1 + math.exp(-value)) for value in inside) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - math.log(1 + math.exp(-sum(inside) / 2))) > 1e-2  # where the mean would be inside
    assert logs["implicit_accuracy"] == 0.5 and logs["margin"].item() == pytest.approx(sum(inside) / 2, rel=1e-5)
    gains = [4 * ((0.25 - 0.01) + (2.25 - 1.21)) / 2, 4 * ((0.25 - 0.81) + (12.25 - 9.61)) / 2]
    assert [logs[name].item() for name in ("chosen", "rejected")] == pytest.approx(gains, rel=1e-5)


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_gradient_is_that_of_the_formula_in_float64(dataset, kind):
    """Against central differences of the formula, written out with the network's raw output and its own target."""
    process = PROCESSES[kind]
    method, step = started(dataset, DPOConfig(beta=20.0), process)
    parameters = list(method.student.trainable().values())
    found = torch.autograd.grad(method.generator_loss(step)[0], parameters)

    backend, batch = method.student.backend, dataset.batch(0, 8, 0)
    backend.network.double(), method.student.lora.double()
    cond, sigma = batch.cond.map(torch.Tensor.double), step.sigma[:8].double()
    level, noise = sigma.view(-1, 1, 1, 1), step.noise[:8].double()

    def error(latents, lora):
        with torch.no_grad(), backend.switch.on(lora):
            if kind == "flow":
                output = backend.forward((1 - level) * latents + level * noise, sigma * 1000, cond)
                return (output - (noise - latents)).square().mean((1, 2, 3))
            alpha = (1 + level**2) ** -0.5
            output = backend.forward(alpha * (latents + level * noise), process.timestep(sigma), cond)
            target = noise if kind == "eps" else alpha * noise - alpha * level * latents
            return (output - target).square().mean((1, 2, 3))

    w, l = batch.latents.double(), batch.beside["rejected"].double()  # noqa: E741

    def loss():
        lora = method.student.lora
        inside = -20.0 / 2 * ((error(w, lora) - error(l, lora)) - (error(w, None) - error(l, None)))
        return (1 + (-inside).exp()).log().mean().item()

    assert method.generator_loss(step)[0].item() == pytest.approx(loss(), rel=1e-5)
    for parameter, gradient in zip(parameters, found, strict=True):
        place = int(gradient.abs().argmax())
        values = []
        for change in (1e-5, -1e-5):
            parameter.data.view(-1)[place] += change
            values.append(loss())
            parameter.data.view(-1)[place] -= change
        assert gradient.view(-1)[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=2e-3, abs=1e-6)


def test_a_pair_shares_level_and_noise(dataset):
    _, step = started(dataset)
    for value in (step.sigma, step.noise, step.batch.cond.context):
        assert torch.equal(value[:8], value[8:])
    batch = dataset.batch(0, 8, 0)
    assert torch.equal(step.batch.latents[8:], batch.beside["rejected"]) and not torch.equal(step.x[:8], step.x[8:])
    _, again = started(dataset, seed=4)
    assert not torch.equal(step.noise, again.noise) and not torch.equal(step.sigma, again.sigma)


@pytest.mark.parametrize("kind", PROCESSES)
def test_levels_are_even_over_the_timesteps_or_the_students_own(dataset, kind):
    process, levels = PROCESSES[kind], []
    for seed in range(40):
        _, step = started(dataset, process=process, size=16, seed=seed)
        levels.append(step.sigma[:16])
    timesteps = process.timestep(torch.cat(levels)) / 1000
    assert kstest(timesteps.double().numpy(), uniform(0, 1).cdf).pvalue > 1e-3 and timesteps.min() >= 0
    wanted = (process.sigma_max, 0.5)
    config = DPOConfig(preference_levels=STUDENT, student_sigmas=wanted)
    _, step = started(dataset, config, process, size=16)
    assert {round(level, 4) for level in step.sigma.tolist()} == {round(level, 4) for level in wanted}
    assert torch.equal(step.sigma[:16], step.sigma[16:])


def test_the_student_starts_as_the_reference(dataset):
    """Inside is 0 to the last bit, the loss log 2, and yet there is a gradient."""
    for mixed in (False, True):
        method, _ = started(dataset)
        for up in method.student.lora.up:
            torch.nn.init.zeros_(up)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            step = method.start(dataset.batch(0, 8, 0), ItemNoise(0, range(8)), 0)
            loss, logs = method.generator_loss(step)
        assert not step.inside.any() and loss.item() == pytest.approx(math.log(2)) and logs["implicit_accuracy"] == 0
        loss.backward()
        assert any(up.grad.any() for up in method.student.lora.up)
        assert all(p.grad is None for p in method.teacher.backend.network.parameters())


def test_under_autocast_errors_are_float32(dataset):
    method, _ = started(dataset)
    with torch.autocast("cpu", torch.bfloat16):
        step = method.start(dataset.batch(0, 8, 0), ItemNoise(0, range(8)), 0)
        loss, errors, inside = method.generator_loss(step)[0], step.errors(step.fake), step.inside
    assert {value.dtype for value in (loss, errors, inside)} == {torch.float32} and inside.any()
    exact = ((step.fake - step.batch.latents).double().square().mean((1, 2, 3)) / step.sigma.double() ** 2).view(2, 8)
    torch.testing.assert_close(errors.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_has_the_path_off_in_every_family(family, make_backend, checkpointing):
    """One network in memory; blocks that are computed again in the backward pass see the path again."""
    gradients = []
    for recompute in {False, checkpointing}:
        backend = make_backend(family, gradient_checkpointing=recompute)
        g = torch.Generator().manual_seed(1)
        latents, rejected = torch.randn(2, 4, 4, 6, 8, generator=g)
        batch = Batch(latents, build_cond(4), beside={"rejected": rejected})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method = new_method(DPOConfig(), Components(backend), batch, 2)
            for up in method.student.lora.up:
                torch.nn.init.normal_(up, std=0.05)
        assert method.teacher.backend is method.student.backend and method.teacher.lora is None
        step = method.start(batch, ItemNoise(0, range(4)), 0)
        alone = Denoiser(DiffusersBackend(build_network(family), backend.process))
        with torch.no_grad():
            torch.testing.assert_close(step.reference, alone(step.x, step.sigma, step.batch.cond))
        weights = list(method.student.trainable().values())
        found = torch.autograd.grad(method.generator_loss(step)[0], weights, materialize_grads=True)
        assert sum(bool(gradient.any()) for gradient in found) > 0.8 * len(found)  # the last block's text goes nowhere
        gradients.append(found)
    for a, b in zip(gradients[0], gradients[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())


# Runs


@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_learns_the_order_of_pairs_it_has_not_seen(dataset, rank):
    config = DPOConfig(beta=50.0)
    changes = dict(steps=60, batch_size=8, student_lr=3e-3, validation=8, validation_every=1000, betas=(0.9, 0.99))
    run = toy_run(dataset, ladd=config, rank=rank, **changes)
    before = {name: value.clone() for name, value in run.method.teacher.backend.network.named_parameters()}
    found = [event.logs for event in train(run, [Validation(run)])]
    assert found[-1]["validation_accuracy"] > 0.65 and found[-1]["validation"] < min(0.65, found[0]["validation"])
    assert {"preference", "implicit_accuracy", "margin", "chosen", "rejected", "spread"} <= found[-1].keys()
    after = run.method.teacher.backend.network.named_parameters()
    assert all(torch.equal(before[name], value) for name, value in after)


def test_held_out_pairs_are_measured_with_the_same_noise_each_time(dataset):
    run = toy_run(dataset, ladd=DPOConfig(), steps=1, batch_size=4, validation=6)
    first, second = Validation(run).figures(), Validation(run).figures()
    assert first == second and first.keys() == {"validation", "validation_accuracy"}
    items = [item for bucket in run.held_out.buckets.values() for item in bucket]
    assert len(items) == 6 and 0 <= first["validation_accuracy"] <= 1
    (one_step,) = train(run)
    assert "validation" not in one_step.logs  # it is the listener's


@pytest.mark.parametrize("rank", [2, 0])
def test_a_stopped_run_goes_on_to_the_same_weights(dataset, tmp_path, rank):
    for folder, stop in (("whole", 99), ("stopped", 3)):
        for again in range(2):
            run = toy_run(dataset, tmp_path / folder, DPOConfig(), rank=rank)
            for event in train(run):
                if event.step == stop and not again:
                    break
    (a, _), (b, _) = (load_tensors(tmp_path / folder / "checkpoint.safetensors") for folder in ("whole", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def description_of(dataset, config) -> dict:
    train_config = TrainConfig(steps=1, batch_size=4)
    run_config = RunConfig(config, train_config, StudentConfig(2), {"base": "", "dataset": ""})
    run = new_run(run_config, toy_parts(), dataset)
    batch, _ = run.batch(0)
    assert not [*start_faults(run, batch), *view_faults(run, batch), *gradient_faults(run, batch)]
    run.method.student.backend.export = lambda lora: lora.export()
    run.method.student.backend.description = dict
    return student_of(run, run_config)[1]


def test_the_file_names_levels_only_where_it_is_used_at_levels_of_its_own(dataset):
    said = description_of(dataset, DPOConfig())
    assert said["method"] == "Diffusion-DPO" and not {"sigmas", "sampler", "cfg"} & said.keys()
    said = description_of(dataset, DPOConfig(preference_levels=STUDENT, student_sigmas=LEVELS))
    assert said["sigmas"] == list(LEVELS)


# What cannot be


def test_items_that_are_no_pairs_are_refused(tmp_path):
    dataset = cache_toy(tmp_path)
    with pytest.raises(ValueError, match="learns from pairs of pictures: make pairs with `cache`"):
        next(train(toy_run(dataset, ladd=DPOConfig())))
    config = RunConfig(DPOConfig(), TrainConfig(), StudentConfig(2), {"base": "", "dataset": ""})
    with pytest.raises(ValueError, match="items without rejected .a latent of the same text.*make pairs with `cache`"):
        new_run(config, toy_parts(), dataset)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(terms={"pairs": 1.0}), "terms must weight some of preference"),
        (dict(beta=0.0), "beta must be above 0"),
        (dict(preference_levels="own"), "one of all, student"),
        (dict(preference_levels=ALL, student_sigmas=(1.0,)), "are for preference_levels"),
        (dict(own_share=0.5), "own_share"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**wrong)
