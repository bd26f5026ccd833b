"""A run that is put aside keeps everything under another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_core.files import alone_in
from distill_core.training.aside import put_aside
from distill_core.training.run_folder import RunFolder


def a_run(root: Path, text: str) -> tuple[RunFolder, Path]:
    folder, student = RunFolder(root / "runs" / "fox"), root / "loras" / "fox.safetensors"
    for path in (folder.log, folder.report, student, root / "loras" / "snapshots" / "fox_step000500.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder, student


def test_everything_of_a_run_has_another_name_and_nothing_is_overwritten(tmp_path):
    other = tmp_path / "loras" / "snapshots" / "foxes_step000500.safetensors"
    for number in (1, 2):
        folder, student = a_run(tmp_path, f"run {number}")
        other.write_text("another run's")
        assert put_aside(folder, student) == f"fox_old{number}"
        assert not folder.path.exists() and not student.exists()
    for number in (1, 2):
        name = f"fox_old{number}"
        kept = [tmp_path / "runs" / name / "log.jsonl", tmp_path / "runs" / name / "report.json"]
        kept += [tmp_path / "loras" / f"{name}.safetensors"]
        kept += [tmp_path / "loras" / "snapshots" / f"{name}_step000500.safetensors"]
        assert [path.read_text() for path in kept] == [f"run {number}"] * 4
    assert other.read_text() == "another run's"


def test_without_a_run_nothing_happens(tmp_path):
    folder = RunFolder(tmp_path / "fox")
    folder.start(guidance=1.0)
    assert put_aside(folder, tmp_path / "fox.safetensors") == "" and folder.started() == {"guidance": 1.0}


def test_a_run_that_another_process_trains_stays(tmp_path):
    folder, student = a_run(tmp_path, "running")
    with alone_in(folder.path, "training"), pytest.raises(ValueError, match="is training in"):
        put_aside(folder, student)
    assert folder.log.read_text() == "running" and student.exists()
