"""Trouble with files ends in a sentence; a killed process leaves nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from distill_core.errors import opening, sentence, write_error
from distill_core.files import check_finite, read_json, save_json, save_tensors
from distill_core.lora_files import parse_description, save_lora
from distill_core.lora_files import read_lora as read
from distill_core.models.backends.diffusers_folders import only_variant


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO]
)
@pytest.mark.case("attack 3", "a full or read-only disk, a file for a folder: one sentence with file and cure")
def test_a_systems_error_is_a_sentence(number):
    said = sentence(OSError(number, os.strerror(number), "/there/x"))
    assert said.startswith("/there/x ") and len(said.splitlines()) == 1 and len(said) > 40


def test_a_write_of_safetensors_that_failed_keeps_its_number():
    error = write_error(SafetensorError("I/O error: No space left on device (os error 28)"), "/a/b")
    assert error.errno == errno.ENOSPC and "disk is full" in sentence(error) and "/a/b" in sentence(error)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{", "[" * 100000, '{"a": ' * 9999])
@pytest.mark.case("attack 8", "JSON that is cut, of another kind or nested without end names its file and the cure")
def test_damaged_json_names_its_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json is damaged: .*restore a copy"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "change",
    [
        {"sigmas": "[]"},
        {"sigmas": '["a"]'},
        {"sigmas": "[0.5, 1.0]"},
        {"sigmas": "[NaN]"},
        {"cfg": "null"},
        {"steps": "[]"},
    ],
)
def test_a_damaged_description_is_told(change):
    with pytest.raises(ValueError):
        parse_description({"sigmas": "[1.0]", "cfg": "1.0", **change})


@pytest.mark.case("attack 11", "a LoRA with values that are not finite is refused")
def test_a_lora_of_nan_is_refused(tmp_path):
    state = {"a.lora_A.weight": torch.full((1, 1), float("nan"))}
    save_lora(tmp_path / "s.safetensors", state, {"sigmas": [1.0], "cfg": 1.0, "steps": 1, "config": {}})
    with pytest.raises(ValueError, match="s.safetensors is damaged: a.lora_A.weight has values that are not finite"):
        read(tmp_path / "s.safetensors")
    check_finite({"whole": torch.ones(2, dtype=torch.int64)}, "x", "")


@pytest.mark.case("attack 7", "the next write removes what killed processes left, and nothing of living ones")
def test_what_a_killed_process_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, living = tmp_path / f".a.json.{ended.pid}.tmp", tmp_path / f".a.json.{os.getppid()}.tmp"
    for path in (left, living):
        path.mkdir()
        (path / ".tmpAbCdEf").write_text("half")  # safetensors' own
    old = tmp_path / f".a.json.{ended.pid}0000000.tmp"  # of version 0.2
    old.write_text("half")
    save_json(tmp_path / "a.json", {})
    assert not left.exists() and not old.exists() and living.exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(1)})
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(TypeError):
        save_json(tmp_path / "a", {"x": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == before


def test_what_a_foreign_loader_says_is_named():
    with pytest.raises(ValueError, match="/x cannot be opened as a network .size mismatch"), opening("/x", "a network"):
        raise RuntimeError("size mismatch\nfor a.weight")


@pytest.mark.case("training 14", "a folder with files of the fp16 variant only is opened")
@pytest.mark.case("training D8", "a folder with the fp16 variant alone is opened")
def test_the_variant_that_is_there(tmp_path):
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert only_variant([tmp_path]) == "fp16"
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert only_variant([tmp_path]) is None
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    )
    assert only_variant([tmp_path]) is None


def test_a_full_disk_is_named_without_a_file():
    """A write to an open file raises an OSError without a name."""
    assert "a file cannot be written: the disk is full. Make room" in sentence(OSError(errno.ENOSPC, "No space left"))
    assert sentence(OSError("the peer is gone")) == "the peer is gone"
