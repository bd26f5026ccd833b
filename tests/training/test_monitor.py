import json
import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from toy import TERMS, cache_toy, toy_run

from distill_core.files import load_tensors
from distill_core.training import loop
from distill_core.training import monitor as module
from distill_core.training.loop import train
from distill_core.training.monitor import Collapse, Health, Monitor


def verdicts(gap, logit_spread=0.5, accuracy=0.5, diversity=0.8, **more) -> dict[str, float]:
    return {"logit_gap": gap, "logit_spread": logit_spread, "accuracy": accuracy, "diversity": diversity, **more}


def word_after(logs: list[dict], **settings) -> str:
    health = Health(window=10, **settings)
    return [health.update(entry) for entry in logs][-1].word


def test_the_first_steps_get_no_verdict():
    assert word_after([verdicts(5.0)] * 9) == "starting" and word_after([verdicts(5.0)] * 10) == "overpowering"


@pytest.mark.parametrize(
    "gap, spread, word",
    [
        (0.05, 0.3, "healthy"),
        (-0.05, 0.3, "healthy"),
        (0.9, 0.8, "healthy"),
        (-0.4, 0.1, "blind"),
        (0.0002, 0.06, "blind"),
        (1.8, 0.6, "overpowering"),
        (3.1, 0.8, "overpowering"),
    ],
)
def test_words_of_the_runs_they_were_set_on(gap, spread, word):
    """Gap and spread as in docs/health.md."""
    assert word_after([verdicts(gap, spread)] * 12) == word


def test_an_accuracy_of_one_half_is_not_blind_by_itself():
    """Small gaps of changing sign: the student keeps up with heads that see something."""
    assert word_after([verdicts(0.05 * (-1) ** i, 0.3, accuracy=0.5) for i in range(20)]) == "healthy"


def test_words_do_not_depend_on_the_scale_of_the_logits():
    for scale in (1e-3, 1.0, 1e3):
        assert word_after([verdicts(-0.4 * scale, 0.1 * scale)] * 10) == "blind"
        assert word_after([verdicts(0.1 * scale, 0.3 * scale)] * 10) == "healthy"


def test_one_wild_step_changes_nothing():
    assert word_after([verdicts(0.1)] * 9 + [verdicts(4.0)]) == "healthy"
    assert word_after([verdicts(3.0)] * 9 + [verdicts(3.0, diversity=0.0)], patience=1) == "overpowering"


def test_runs_without_heads_or_with_one_item():
    assert word_after([{"pairs": 0.3, "diversity": 0.9}] * 10) == "no discriminator"
    assert word_after([{"logit_gap": 0.3, "accuracy": 1.0}] * 10) == "unknown"


@pytest.mark.parametrize("gap", [-1.2, 2.0])
@pytest.mark.parametrize("diversity", [0.05, 8.0])
def test_outputs_that_are_alike_or_wild_count_as_collapsed_when_the_heads_are_sure_of_it(diversity, gap):
    """Gaps of 2.4 and 4 spreads."""
    lost = verdicts(gap, diversity=diversity, spread=diversity)
    health = Health(window=10, patience=15)
    words = [health.update(entry).word for entry in [verdicts(0.1, spread=0.8)] * 10 + [lost] * 40]
    assert "collapsed" not in words[:24] and words[-1] == "collapsed"
    for _ in range(10):
        word = health.update(verdicts(0.1, spread=0.8)).word
    assert word == "healthy", "it may recover"


@pytest.mark.case("training D1b", "3 pictures: separation 4.7, diversity .77 is advice and ends nothing")
@pytest.mark.parametrize("gap, word", [(-2.5, "blind"), (2.35, "overpowering"), (50.0, "overpowering")])
def test_a_verdict_that_could_not_be_clearer_is_advice(gap, word):
    assert word_after([verdicts(gap, diversity=0.77, spread=0.7)] * 500) == word


@pytest.mark.parametrize("diversity", [0.05, 8.0])
def test_outputs_that_are_alike_or_wild_are_no_end_while_the_heads_are_unsure(diversity):
    logs = [verdicts(0.1, spread=0.8)] * 10 + [verdicts(0.1, diversity=diversity, spread=diversity)] * 500
    assert word_after(logs) == "healthy"


def test_pictures_that_are_almost_alike_are_no_wild_student():
    """Ten frames of a film: the real spread is .04, and the student still varies as its teacher does."""
    assert word_after([verdicts(3.0, diversity=20.0, spread=0.8)] * 500) == "overpowering"


def test_a_student_that_began_as_a_blur_is_not_lost():
    """One step from pure noise: the untrained answer hardly varies, and any heads see that."""
    assert word_after([verdicts(3.0, diversity=0.1, spread=0.08)] * 500) == "overpowering"


def test_outputs_far_larger_than_latents_need_no_verdict():
    """Also in a run of a single picture, which has no diversity."""
    assert word_after([verdicts(0.1, size=1e4)] * 110) == "collapsed"
    assert word_after([verdicts(0.1, size=math.nan)] * 110) == "collapsed"
    assert word_after([{"logit_gap": 0.1, "accuracy": 0.5, "size": 1e4}] * 110) == "collapsed"
    assert word_after([verdicts(0.1, size=3.0)] * 500) == "healthy"


@pytest.mark.case("training 17", "lr 1: outputs keep their size while the gradient's norm is 1e9 to 1e15; it is ended")
def test_a_gradient_beyond_all_bounds_needs_no_verdict():
    assert word_after([verdicts(3.0, size=1.7, generator_grad_norm=5e9)] * 110) == "collapsed"
    assert word_after([verdicts(3.0, size=1.7, generator_grad_norm=1e4)] * 500) == "overpowering"


def test_a_run_without_heads_is_lost_by_its_outputs_alone():
    logs = [{"pairs": 0.3, "diversity": 0.9, "spread": 0.9}] * 10 + [{"diversity": 0.01, "spread": 0.01}] * 120
    assert word_after(logs) == "collapsed"


@pytest.mark.case("training D1", "steps of a single item say nothing, and do not dilute those that do")
def test_steps_without_two_items_do_not_count():
    alone = {"logit_gap": 3.0, "accuracy": 1.0}
    assert word_after([alone] * 500) == "unknown"
    health = Health(window=10)
    for entry in [alone, verdicts(1.5, 0.5, diversity=0.6, spread=0.5)] * 10:
        condition = health.update(entry)
    assert condition.diversity == pytest.approx(0.6) and condition.separation == pytest.approx(2.25 / 0.5)


def test_every_word_has_advice():
    assert all(module.Condition(word).advice for word in module.ADVICE)


# On runs.


def run_of(dataset, tmp_path, **settings):
    return toy_run(dataset, tmp_path / "run", **{"steps": 60, "batch_size": 8, **settings})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("toy"))


def monitored(run, health: Health | None = None):
    """Events and conditions of a run under a `Monitor`, used as `training.run.train_to_end` uses it."""
    with Monitor(run, health) as monitor, closing(train(run, [monitor])) as events:
        for event in events:
            yield event, monitor.condition


def test_watching_changes_nothing(dataset, tmp_path):
    seen = [event for event, _ in monitored(run_of(dataset, tmp_path / "a", steps=8))]
    plain = list(train(run_of(dataset, tmp_path / "b", steps=8)))
    assert seen == plain
    a, b = (load_tensors(tmp_path / x / "run" / "checkpoint.safetensors")[0] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b) and a.keys() == b.keys()


LOST = {"diversity": 0.0, "spread": 0.0, "logit_gap": 9.0, "logit_spread": 1.0}


@pytest.fixture
def lost_from(monkeypatch):
    """lost_from(step): from that step on, every step logs one image for everything, and heads that tell it."""

    def patch(first: int) -> None:
        honest = loop.training_step
        monkeypatch.setattr(loop, "training_step", lambda run: honest(run) | (LOST if run.step >= first else {}))

    return patch


def weights_of(run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in (*run.student_parameters.items(), *run.ema.items())}


def test_a_collapse_ends_the_run_with_the_last_good_weights(dataset, tmp_path, lost_from):
    run, kept = run_of(dataset, tmp_path, checkpoint_every=1), {}
    lost_from(25)
    with pytest.raises(
        Collapse, match="after step .*all alike.*diversity 0 .*weights of step 2[0-5] are kept"
    ) as caught:
        for event, _ in monitored(run, Health(window=5, patience=5)):
            kept[event.step] = {name: value.clone() for name, value in run.ema.items()}
    assert "student_lr below 0.01" in str(caught.value) and "switch stop_when_lost off" in str(caught.value)
    good = int(str(caught.value).split("weights of step ")[1].split()[0])
    assert event.step < 45 and run.step == good
    assert all(torch.equal(run.ema[name], value) for name, value in kept[good].items())
    saved, metadata = load_tensors(run.checkpoint)
    assert all(torch.equal(saved[f"ema.{name}"], value) for name, value in kept[good].items())
    assert json.loads(metadata["run"])["step"] == good
    assert not torch.equal(next(iter(kept[event.step].values())), next(iter(kept[good].values())))


def test_a_lost_run_goes_on_where_it_is_told_to(dataset, tmp_path, lost_from):
    lost_from(5)
    run = run_of(dataset, tmp_path, stop_when_lost=False)
    conditions = [condition.word for _, condition in monitored(run, Health(window=5, patience=5))]
    assert run.step == 60 and conditions[-1] == "collapsed"


def test_the_good_weights_of_a_run_that_goes_on_are_not_those_it_began_with(dataset, tmp_path):
    """It is resumed, and broken in its next step."""
    for _ in train(run_of(dataset, tmp_path, steps=7)):
        pass
    run = run_of(dataset, tmp_path)
    run.resume()
    before = weights_of(run)
    with pytest.raises(Collapse, match="weights of step 7 are kept"):
        for event, _ in monitored(run):
            assert event.step == 8
            next(iter(run.student_parameters.values())).data.fill_(float("nan"))
    assert run.step == 7 and all(torch.equal(before[name], value) for name, value in weights_of(run).items())


def test_an_error_between_the_updates_of_a_step_goes_back_to_a_whole_step(dataset, tmp_path, monkeypatch):
    """The student has moved, its discriminator's second update is not finite: file, step and weights still agree."""
    run = run_of(dataset, tmp_path, discriminator_updates=2)
    honest = run.method.discriminator_loss
    run.players[1] = replace(
        run.players[1], loss=lambda at: (lambda loss, logs: (loss * (math.nan if broken else 1), logs))(*honest(at))
    )
    broken, kept = False, {}
    monkeypatch.setattr(type(run.method.start(*run.batch(0), 0)), "redraw", lambda at: fail(at))
    redraws = []

    def fail(at) -> None:
        nonlocal broken
        redraws.append(at)
        broken = len(redraws) == 13

    with pytest.raises(Collapse, match="discriminator loss is not finite at step 13.*weights of step 10 are kept"):
        for event, _ in monitored(run, Health(window=5)):
            kept[event.step] = weights_of(run)
    assert run.step == 10 and all(torch.equal(kept[10][name], value) for name, value in weights_of(run).items())
    assert json.loads(load_tensors(run.checkpoint)[1]["run"])["step"] == 10


def test_weights_that_are_not_finite_are_never_the_good_ones(dataset, tmp_path):
    run = run_of(dataset, tmp_path)
    monitor = Monitor(run, Health(window=5))
    run.step = 5
    next(iter(run.ema.values())).fill_(float("inf"))
    monitor.good.take()
    assert monitor.good.step == 0 and all(
        value.isfinite().all() for part in monitor.good.copies for value in part.values()
    )


@pytest.mark.case("methods limitations", "good weights are copied into one place: never two copies in memory")
def test_there_is_one_copy_of_the_good_weights(dataset, tmp_path):
    run = run_of(dataset, tmp_path)
    monitor = Monitor(run)
    places = [value.data_ptr() for part in monitor.good.copies for value in part.values()]
    next(iter(run.ema.values())).add_(1.0)
    monitor.good.take()
    assert places == [value.data_ptr() for part in monitor.good.copies for value in part.values()]
    assert torch.equal(next(iter(monitor.good.copies[-1].values())), next(iter(run.ema.values())))


def test_a_loss_that_is_not_finite_ends_the_run_with_finite_weights(dataset, tmp_path):
    run = run_of(dataset, tmp_path)
    honest = run.method.adversarial_term
    run.method.adversarial_term = lambda step: honest(step) * (float("nan") if run.step == 12 else 1.0)
    with pytest.raises(FloatingPointError, match="not finite at step 13"):
        for _ in monitored(run, Health(window=5)):
            pass
    saved, _ = load_tensors(run.checkpoint)
    assert run.step == 12 and all(value.isfinite().all() for value in saved.values())


def test_weights_that_are_not_finite_are_put_back(dataset, tmp_path):
    """An optimiser that overflows after a finite loss."""
    run = run_of(dataset, tmp_path)
    with pytest.raises(Collapse, match="ended after step 13.*weights of step 10 are kept"):
        for event, _ in monitored(run, Health(window=5)):
            if event.step == 13:
                next(iter(run.student_parameters.values())).data.fill_(float("inf"))
    assert run.step == 10
    assert all(value.isfinite().all() for value in run.student_parameters.values())
    assert all(value.isfinite().all() for value in run.ema.values())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="window and patience"):
        Health(window=0)


@pytest.mark.case("training 12", "lr 100: a run that explodes is ended in every method, and no LoRA of it is kept")
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("count", [1, 16])
def test_a_run_that_explodes_is_ended(tmp_path, terms, count):
    run = toy_run(cache_toy(tmp_path, count=count), None, TERMS[terms], steps=130, student_lr=100.0)
    with pytest.raises(FloatingPointError, match="student_lr"):
        for event, _ in monitored(run):
            assert event.step < 130
    assert run.step == 0
