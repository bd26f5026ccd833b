from contextlib import closing

import pytest
import torch
from toy import cache_toy, toy_run

from distill_core.files import load_tensors
from distill_core.training import monitor as module
from distill_core.training.loop import train
from distill_core.training.monitor import Collapse, Health, Monitor


def verdicts(gap, spread=0.5, accuracy=0.5, diversity=0.8, **more) -> dict[str, float]:
    return {"logit_gap": gap, "logit_spread": spread, "accuracy": accuracy, "diversity": diversity, **more}


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
    assert word_after([verdicts(0.1)] * 9 + [verdicts(0.1, diversity=0.0)], patience=1) == "healthy"


def test_runs_without_heads_or_with_one_item():
    assert word_after([{"pairs": 0.3, "diversity": 0.9}] * 10) == "no discriminator"
    assert word_after([{"logit_gap": 0.3, "accuracy": 1.0}] * 10) == "unknown"


@pytest.mark.parametrize("diversity", [0.05, 8.0])
def test_outputs_that_are_alike_or_wild_count_as_collapsed_after_a_while(diversity):
    logs = [verdicts(0.1)] * 10 + [verdicts(0.1, diversity=diversity)] * 40
    health, words = Health(window=10, patience=15), []
    words = [health.update(entry).word for entry in logs]
    assert "collapsed" not in words[:24] and words[-1] == "collapsed"


@pytest.mark.parametrize("gap", [-0.5, 0.8])
def test_a_verdict_that_could_not_be_clearer_counts_as_collapsed_after_a_while(gap):
    health = Health(window=10, patience=15)
    words = [health.update(verdicts(gap, spread=0.2)).word for _ in range(40)]
    assert words[12] == ("blind" if gap < 0 else "overpowering") and words[-1] == "collapsed"
    assert health.update(verdicts(0.0, spread=9.0)).word != "collapsed", "it may recover"


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


def collapse_from(run, step: int) -> None:
    """From a step on, the student gives one image for everything."""
    honest = type(run.method.student).__call__

    class Collapsed(type(run.method.student)):
        def __call__(self, x, sigma, cond):
            out = honest(self, x, sigma, cond)
            return out if run.step < step else out.mean(0, keepdim=True) + 0 * out

    run.method.student.__class__ = Collapsed


def test_a_collapse_ends_the_run_with_the_last_good_weights(dataset, tmp_path):
    run, kept = run_of(dataset, tmp_path), {}
    collapse_from(run, 25)
    with pytest.raises(Collapse, match="all alike.*diversity 0.00.*weights of step 2[0-5] are kept") as caught:
        for event, _ in monitored(run, Health(window=5, patience=5)):
            kept[event.step] = {name: value.clone() for name, value in run.ema.items()}
    good = int(str(caught.value).split("weights of step ")[1].split()[0])
    assert event.step < 45
    assert all(torch.equal(run.ema[name], value) for name, value in kept[good].items())
    saved, _ = load_tensors(run.checkpoint)
    assert all(torch.equal(saved[f"ema.{name}"], value) for name, value in kept[good].items())
    assert not torch.equal(next(iter(kept[event.step].values())), next(iter(kept[good].values())))


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
    with pytest.raises(FloatingPointError):
        for event, _ in monitored(run, Health(window=5)):
            if event.step == 13:
                next(iter(run.student_parameters.values())).data.fill_(float("inf"))
    assert all(value.isfinite().all() for value in run.student_parameters.values())
    assert all(value.isfinite().all() for value in run.ema.values())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="window and patience"):
        Health(window=0)
