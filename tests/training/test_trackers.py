import logging
import sys

import pytest
from test_run import train_toy
from toy import cache_toy, toy_run

from distill_core.training.loop import Event
from distill_core.training.monitor import Condition
from distill_core.training.run_folder import RunFolder
from distill_core.training.trackers import Trackers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def test_tensorboard_shows_what_is_in_the_log(dataset, tmp_path):
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path / "run")
    train_toy(dataset, folder.path, steps=4, validation=1, validation_every=3, trackers=("tensorboard",))
    shown, logs = scalars(folder.path / "trackers" / "run"), folder.logs()
    assert shown.keys() == {name for entry in logs for name in entry} - {"step", "health"}
    for name, values in shown.items():
        assert values == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logs if name in entry]
    assert [step for step, _ in shown["validation"]] == [1, 3, 4]


def test_without_trackers_nothing_is_written_or_imported(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    train_toy(dataset, tmp_path, steps=1)
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize("missing", ["accelerate", "tensorboard"])
def test_a_missing_package_is_named_before_the_first_step(dataset, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f'tracker "tensorboard" needs the package {missing}: install it with `pip'):
        train_toy(dataset, tmp_path, steps=1, trackers=("tensorboard",))
    assert not RunFolder(tmp_path).log.exists()


def test_an_unknown_tracker_is_refused(dataset):
    with pytest.raises(ValueError, match="trackers must be one of tensorboard, wandb.*, not 'nobody'"):
        toy_run(dataset, trackers=("nobody",))


def test_a_tracker_that_does_not_start_is_refused_and_one_that_fails_is_left_out(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "trackers").write_text("a file where a folder is wanted")
    with pytest.raises(ValueError, match='tracker "tensorboard" does not start.*leave it out'):
        Trackers(("tensorboard",), tmp_path, {})
    (tmp_path / "trackers").unlink()
    trackers = Trackers(("tensorboard",), tmp_path, {"betas": (0.0, 0.9)})

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trackers.trackers[0], "log", full)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            trackers(Event(step, 2, {"pairs": 1.0}), Condition("healthy"))
    assert [r.getMessage() for r in caplog.records] == [
        "the tracker tensorboard failed and is left out: No space left on device"
    ]
    trackers.close()
