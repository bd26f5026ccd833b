"""The stop rule keep_at_least: what ends a run, what is saved then, and that no stop or kill changes it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import ToyBackend, cache_toy, toy_run

from distill_core.data.mix import new_mix, open_data
from distill_core.evaluation.retention_watch import RetentionWatch, first_prompts, retention_listeners
from distill_core.files import load_tensors, read_json
from distill_core.lora_files import read_lora
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.tune import TuneConfig
from distill_core.models.lora import LoraConfig
from distill_core.training.loop import Event, train
from distill_core.training.monitor import Condition
from distill_core.training.run import RunConfig, StudentConfig, train_to_end
from distill_core.training.run_folder import RunFolder

STEPS, EVERY = 24, 4


class Exporting(ToyBackend):
    """A toy backbone that writes files."""

    def export(self, lora):
        return lora.export()

    def description(self):
        return {"prediction": "flow", "shift_alpha": "1.0", "family": "toy", "base": "toy"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def opened(dataset, path: Path | None, **settings):
    """A run that soon leaves what it was, and what describes it."""
    usual = dict(steps=STEPS, retention_every=EVERY, student_lr=3e-2, warmup_steps=12, ema_decay=0.5)
    run = toy_run(dataset, path, **{**usual, **settings})
    for view in (run.method.student, run.method.teacher):
        view.backend.__class__ = Exporting
    return run, RunConfig(LADDConfig(), run.config, StudentConfig(2), {"base": "toy", "dataset": dataset.digest()})


def trained(dataset, path: Path, watchers=(), **settings) -> str:
    run, config = opened(dataset, path, **settings)
    listeners = retention_listeners(run, config)
    return train_to_end(run, config, RunFolder(path), path / "student.safetensors", watchers, listeners)


def measured(path: Path) -> dict[int, float]:
    return {entry["step"]: entry["retention"] for entry in RunFolder(path).logs() if "retention" in entry}


@pytest.fixture(scope="module")
def limit(dataset, tmp_path_factory) -> float:
    """Between the figures of two measurements in the middle of the run, the first of which is kept."""
    path = tmp_path_factory.mktemp("free")
    run, config = opened(dataset, path)
    watch = RetentionWatch(run, config)
    train_to_end(run, config, RunFolder(path), path / "student.safetensors", (), [watch])
    found = measured(path)
    assert list(found) == list(range(EVERY, STEPS + 1, EVERY))
    fallen = [step for step in found if step > 2 * EVERY and found[step] < min(found[s] for s in found if s < step)]
    return (found[fallen[0]] + min(found[s] for s in found if s < fallen[0])) / 2


@pytest.fixture(scope="module")
def ended(dataset, limit, tmp_path_factory) -> tuple[Path, str]:
    """A run that the rule ended, and what it said."""
    path = tmp_path_factory.mktemp("ended")
    return path, trained(dataset, path, keep_at_least=limit)


def same(a: Path, b: Path) -> None:
    for name in ("log.jsonl", "report.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("student.safetensors", "checkpoint.safetensors", "kept.safetensors"):
        (first, about_first), (second, about_second) = (load_tensors(path / name) for path in (a, b))
        assert first.keys() == second.keys() and about_first == about_second
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_a_run_ends_where_it_keeps_too_little_with_the_last_student_that_kept_enough(dataset, ended, limit):
    path, said = ended
    found = measured(path)
    (last, figure), kept = list(found.items())[-1], list(found)[-2]
    assert last < STEPS and figure < limit <= found[kept] and RunFolder(path).logs()[-1]["step"] == last
    assert f"ended after step {last}" in said and f"student of step {kept}" in said and "keep_at_least" in said
    assert read_json(path / "report.json")["said"] == said
    state, description = read_lora(path / "student.safetensors")
    assert description["steps"] == kept
    run, config = opened(dataset, None)
    for event in train(run):
        if event.step == kept:
            break
    with run.ema_weights():
        wanted = run.method.student.lora.export()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


class StoppedHere(BaseException):
    pass


def stop_at(step: int):
    def watch(event: Event, condition: Condition) -> None:
        if event.step == step:
            raise StoppedHere

    return watch


@pytest.mark.parametrize("after", [0, -1, EVERY - 1])
def test_a_stopped_run_ends_the_same(dataset, ended, limit, tmp_path, after):
    """Stopped at the last measurement that is kept, just before it, and just before the one that ends the run."""
    step = list(measured(ended[0]))[-2] + after
    with pytest.raises(StoppedHere):
        trained(dataset, tmp_path, [stop_at(step)], keep_at_least=limit)
    assert trained(dataset, tmp_path, keep_at_least=limit) == ended[1]
    same(tmp_path, ended[0])


def test_a_killed_run_ends_the_same(dataset, ended, limit, tmp_path):
    """A kill leaves log and kept student of after the checkpoint."""
    kept = list(measured(ended[0]))[-2]
    with pytest.raises(StoppedHere):
        trained(dataset, tmp_path / "a", [stop_at(kept - EVERY + 1)], keep_at_least=limit)
    shutil.copy(tmp_path / "a" / "checkpoint.safetensors", tmp_path / "older")
    with pytest.raises(StoppedHere):
        trained(dataset, tmp_path / "a", [stop_at(kept + 2)], keep_at_least=limit)
    shutil.copy(tmp_path / "older", tmp_path / "a" / "checkpoint.safetensors")
    assert trained(dataset, tmp_path / "a", keep_at_least=limit) == ended[1]
    same(tmp_path / "a", ended[0])


def test_a_run_that_has_ended_does_no_step_more_unless_the_limit_is_lowered(dataset, ended, limit, tmp_path):
    path = shutil.copytree(ended[0], tmp_path / "run")
    steps: list[int] = []
    watch = lambda event, condition: steps.append(event.step)  # noqa: E731
    assert trained(dataset, path, [watch], keep_at_least=limit) == ended[1] and steps == []
    same(path, ended[0])
    last = list(measured(path))[-1]
    assert trained(dataset, path, [watch], keep_at_least=1e-9) == ""
    assert steps == list(range(last + 1, STEPS + 1)) and "said" not in read_json(path / "report.json")
    assert read_lora(path / "student.safetensors")[1]["steps"] == STEPS
    with pytest.raises(ValueError, match="the last with a retention of at least .* is no longer there"):
        trained(dataset, path, keep_at_least=limit)


def test_measuring_changes_nothing_of_the_training(dataset):
    plain, watched = (opened(dataset, None, keep_at_least=rule)[0] for rule in (0.0, 0.1))
    config = RunConfig(LADDConfig(), watched.config, StudentConfig(2), {"base": "toy", "dataset": dataset.digest()})
    logs = [
        [e.logs for e in train(run, of)] for run, of in ((plain, []), (watched, retention_listeners(watched, config)))
    ]
    assert [{k: v for k, v in entry.items() if k != "retention"} for entry in logs[1]] == logs[0]
    assert all(torch.equal(plain.ema[name], watched.ema[name]) for name in plain.ema)


def test_a_run_without_a_limit_is_told_when_it_has_lost_much(dataset, tmp_path):
    for lost in (False, True):
        listener = lambda event, lost=lost: event.logs.update(retention=0.5 if lost else 0.95)  # noqa: E731
        run, config = opened(dataset, tmp_path / str(lost), steps=2)
        said = train_to_end(run, config, RunFolder(tmp_path / str(lost)), tmp_path / "s.safetensors", (), [listener])
        assert ("retention is 0.500 at the end" in said) == lost and bool(said) == lost


def test_it_is_measured_where_a_turbo_is_tuned_or_a_limit_is_set(dataset):
    run, config = opened(dataset, None)
    assert retention_listeners(run, config) == []
    assert len(retention_listeners(run, replace(config, method=TuneConfig()))) == 1
    limited = replace(config, train=replace(config.train, keep_at_least=0.5))
    assert len(retention_listeners(run, limited)) == 1
    never = replace(limited, train=replace(limited.train, retention_every=0))
    with pytest.raises(ValueError, match="set retention_every above 0"):
        retention_listeners(run, never)
    started = replace(limited, student=StudentConfig(2, lora=LoraConfig(start_from="a.safetensors")))
    with pytest.raises(ValueError, match="load that LoRA into the model instead"):
        retention_listeners(run, started)


def test_the_prompts_are_those_that_are_to_be_kept(tmp_path):
    own = cache_toy(tmp_path / "own", state_sigmas=(), seed=1)
    kept = cache_toy(tmp_path / "kept", count=8)
    run, config = opened(open_data(new_mix({own.folder: 0.5, kept.folder: 0.5})), None)
    asked = RetentionWatch(run, config).asked
    wanted = first_prompts(kept, 4)
    assert len(asked.conds) == len(wanted) == 3, "the toy has three prompts"
    for cond, other in zip(asked.conds, wanted, strict=True):
        assert torch.equal(cond.context, other.context)
