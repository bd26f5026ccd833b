"""run.html: one file with curves, samples over time, settings and messages; a picture that fails ends no run."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from distill_core.evaluation.run_page import MOST_SAMPLES, RunPage, messages, note, samples_folder, write_page
from distill_core.training.loop import Event
from distill_core.training.monitor import Condition
from distill_core.training.run_folder import RunFolder

SETTINGS = {"steps": 6, "student_lr": 0.001, "ladd": {"terms": {"pairs": 4.0}}, "dataset": "<b>"}


def a_run(tmp_path, steps: int = 6) -> RunFolder:
    folder = RunFolder(tmp_path / "fox")
    folder.path.mkdir()
    entry = lambda step: {"step": step, "adversarial": 0.1 * step, "health": "starting" if step < 4 else "healthy"}  # noqa: E731
    folder.log.write_text("".join(json.dumps(entry(step + 1)) + "\n" for step in range(steps)))
    return folder


def follow(page: RunPage, steps: int = 6, of: int = 6) -> None:
    for step in range(1, steps + 1):
        page(Event(step, of, {"adversarial": 0.1}), Condition("healthy"))


def colour(count: list) -> Image.Image:
    count.append(len(count))
    return Image.new("RGB", (40, 20), (40 * len(count), 0, 0))


def test_the_page_shows_the_whole_run_and_needs_no_other_file(tmp_path):
    folder, drawn = a_run(tmp_path), []
    note(folder, "the student is trained at 1 & 0.5")
    with RunPage(folder, SETTINGS, lambda: colour(drawn), every=2, write_every=100) as page:
        follow(page)
    assert len(drawn) == 3 and page.drawn == 6
    names = [path.name for path in sorted(samples_folder(folder).iterdir())]
    assert names == ["step000002.jpg", "step000004.jpg", "step000006.jpg"]
    html = (folder.path / "run.html").read_text()
    assert [step for step in (2, 4, 6) if f"step {step}</figcaption>" not in html] == []
    assert html.count("data:image/jpeg;base64,") == 3 and html.count("data:image/png;base64,") == 1
    assert "<td>ladd.terms.pairs</td><td>4.0</td>" in html and "&lt;b&gt;" in html and "<b>" not in html
    assert "1 &amp; 0.5" in html and "from step 4: healthy" in html and "step 6 of 6" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and 'http-equiv="refresh"' not in html


def test_a_stopped_run_has_its_page_which_says_so(tmp_path):
    folder = a_run(tmp_path, 3)
    with pytest.raises(ValueError), RunPage(folder, SETTINGS, None, every=0, write_every=100) as page:
        follow(page, 3)
        raise ValueError("the disk is full")
    html = (folder.path / "run.html").read_text()
    assert "stopped after step 3: the disk is full" in html and "step 3 of 6" in html
    assert 'http-equiv="refresh"' in html, "it may go on"


def test_a_run_that_ends_before_its_last_step_is_not_looked_at_again(tmp_path):
    folder = a_run(tmp_path, 3)
    with RunPage(folder, SETTINGS, None, every=0, write_every=1) as page:
        follow(page, 3)
        assert 'http-equiv="refresh"' in (folder.path / "run.html").read_text()
        note(folder, "ended after step 3: retention 0.600 is below keep_at_least = 0.7")
    html = (folder.path / "run.html").read_text()
    assert "ended after step 3" in html and 'http-equiv="refresh"' not in html


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path):
    def fails() -> Image.Image:
        raise RuntimeError("out of memory\nwith a long tail")

    folder, said = a_run(tmp_path), []
    with RunPage(folder, SETTINGS, fails, every=1, write_every=1, say=said.append) as page:
        follow(page)
    assert said == messages(folder) == ["step 1: no more samples are drawn: out of memory"]


def test_a_long_run_shows_some_of_its_samples_and_the_last(tmp_path):
    folder = a_run(tmp_path)
    samples_folder(folder).mkdir()
    for step in range(1, 102):
        Image.new("RGB", (4, 4)).save(samples_folder(folder) / f"step{step:06}.jpg")
    html = write_page(folder, SETTINGS).read_text()
    assert html.count("<figcaption>") == MOST_SAMPLES and "step 101</figcaption>" in html
