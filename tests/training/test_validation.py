import json

import pytest
import torch
from toy import LEVELS, cache_toy, toy_run

from distill_core.data.mix import new_mix, open_data
from distill_core.diffusion.noise import ItemNoise
from distill_core.files import load_tensors
from distill_core.methods.ladd import LADDConfig
from distill_core.training.loop import train
from distill_core.training.validation import Validation

PAIRS = LADDConfig({"adversarial": 0.0, "pairs": 1.0})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"), shard_size=3)


@pytest.fixture(scope="module")
def without_pairs(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("latents"), state_sigmas=())


def figures(run) -> dict[int, float]:
    """Step -> validation."""
    return {e.step: e.logs["validation"] for e in train(run, [Validation(run)]) if "validation" in e.logs}


def test_it_is_measured_after_the_first_each_nth_and_the_last_step_and_falls(dataset):
    run = toy_run(dataset, ladd=PAIRS, steps=65, validation=0.25, validation_every=30)
    found = figures(run)
    assert list(found) == [1, 30, 60, 65] and found[65] < 0.9 * found[1]


def test_pairs_are_measured_from_the_teachers_states(dataset):
    """By hand, for items of several shards in batches that they do not fill."""
    run = toy_run(dataset, steps=1, validation=5, batch_size=2)
    held_out = [item for bucket in run.held_out.buckets.values() for item in bucket]
    batch, errors = run.held_out.read(held_out), []
    assert len(held_out) == 5 and run.held_out.state_sigmas == LEVELS
    with torch.no_grad(), run.ema_weights():
        for index, level in enumerate(LEVELS):
            answer = run.method.student(batch.states[:, index], torch.full((5,), level), batch.cond)
            errors.append((answer - batch.latents).square().mean())
    assert Validation(run).figures()["validation"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_without_pairs_latents_are_noised_below_the_highest_level(without_pairs):
    run = toy_run(without_pairs, steps=1, validation=1, batch_size=2)
    batch, process, errors = run.held_out.read(run.held_out.buckets[next(iter(run.held_out.buckets))]), None, []
    process, noise = run.method.student.process, ItemNoise(0, [0], "validation").normal_like(batch.latents)
    with torch.no_grad(), run.ema_weights():
        for level in LEVELS[1:]:
            sigma = torch.tensor([level])
            answer = run.method.student(process.noise_scaling(sigma, noise, batch.latents), sigma, batch.cond)
            errors.append((answer - batch.latents).square().mean())
    loss = Validation(run).figures()["validation"]
    assert (
        loss == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
        and loss == Validation(run).figures()["validation"]
    )


def test_measuring_changes_nothing_and_a_resumed_run_measures_the_same(dataset, tmp_path):
    changes = dict(validation=0.25, validation_every=2, steps=6)
    whole = toy_run(dataset, **changes)
    expected = figures(whole)
    silent = toy_run(dataset, **changes)
    assert [event.step for event in train(silent)][-1] == 6
    assert all(value.equal(silent.ema[name]) for name, value in whole.ema.items())
    stopped = toy_run(dataset, tmp_path, **changes)
    for event in train(stopped, [Validation(stopped)]):
        if event.step == 3:
            break
    resumed = figures(toy_run(dataset, tmp_path, **changes))
    assert resumed == {step: value for step, value in expected.items() if step > 3}


def test_the_items_held_out_are_part_of_the_runs_identity(dataset, tmp_path):
    for _ in train(toy_run(dataset, tmp_path, validation=2, steps=2)):
        pass
    settings = json.loads(load_tensors(tmp_path / "checkpoint.safetensors")[1]["run"])["settings"]
    assert settings["validation"] == 2
    with pytest.raises(ValueError, match="validation is 3 now, was 2"):
        toy_run(dataset, tmp_path, validation=3).resume()
    assert toy_run(dataset, tmp_path, validation=2, validation_every=7).resume()  # how often changes nothing


def test_a_student_of_pure_noise_without_pairs_has_nothing_to_measure(without_pairs):
    one_step = LADDConfig(student_sigmas=(1.0,), probabilities=(1.0,))
    with pytest.raises(ValueError, match="nothing to measure.*state_sigmas.*set validation to 0"):
        Validation(toy_run(without_pairs, ladd=one_step, validation=1))


def test_items_of_a_mix_are_measured_as_their_dataset_allows(dataset, without_pairs):
    """Those with pairs from the states, the others noised; one-step students on the former only."""
    both = open_data(new_mix({dataset.folder: 1.0, without_pairs.folder: 1.0}))
    run = toy_run(both, validation=16)
    sources = {key[-1] for key in run.held_out.buckets}
    assert sources == {0, 1} and 0 < Validation(run).figures()["validation"] < 10
    one_step = LADDConfig(student_sigmas=(1.0,), probabilities=(1.0,))
    assert Validation(toy_run(both, ladd=one_step, validation=16)).figures()["validation"] > 0
