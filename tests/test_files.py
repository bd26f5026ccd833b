import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy import ToyNetwork

from distill_core.files import (
    SAMPLE_BYTES,
    file_digest,
    fingerprint,
    load_tensors,
    read_lora,
    save_json,
    save_lora,
    save_tensors,
    weights_digest,
)


def write_for_ever(folder: Path, ready) -> None:
    torch.set_num_threads(1)  # a forked process must not use its parent's thread pool
    n = 0
    while True:
        n += 1
        tensors = {"a": torch.full((4_000_000,), float(n)), "b": torch.tensor([n])}
        save_tensors(folder / "run.safetensors", tensors, {"n": str(n)})
        save_json(folder / "state.json", {"n": n, "text": "x" * 100_000})
        ready.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_write_that_is_killed_leaves_a_whole_file(tmp_path):
    """SIGKILL at several moments of a loop of writes: what is there is the previous or the next version, complete."""
    processes = multiprocessing.get_context("fork")
    for delay in (0.0, 0.006, 0.013, 0.021, 0.03, 0.04):
        ready = processes.Event()
        writer = processes.Process(target=write_for_ever, args=(tmp_path, ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(delay)
        writer.kill()
        writer.join()
        tensors, metadata = load_tensors(tmp_path / "run.safetensors")
        n = float(metadata["n"])
        assert (tensors["a"] == n).all() and tensors["b"].item() == n >= 1
        state = json.loads((tmp_path / "state.json").read_text())
        assert n - 1 <= state["n"] <= n and len(state["text"]) == 100_000


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert load_tensors(path)[0]["a"].tolist() == [1, 1] and list(tmp_path.iterdir()) == [path]


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    tensors = {"transposed": torch.arange(6.0).view(2, 3).T, "half": torch.ones(1).bfloat16(), "count": torch.tensor(7)}
    save_tensors(path, tensors, {"key": "value"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"key": "value"} and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    save_json(tmp_path / "deep" / "a.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"a": [1, 2]}


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="there is no file .*a.safetensors"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a.safetensors is not a complete safetensors file"):
        load_tensors(path)
    path.write_text("not at all")
    with pytest.raises(ValueError, match="a.safetensors is not a complete safetensors file"):
        load_tensors(path)


def test_a_lora_describes_itself_in_strings(tmp_path):
    state = {"transformer.a.lora_A.weight": torch.ones(2, 3)}
    description = {
        "method": "ladd",
        "sigmas": [1.0, 0.5],
        "sampler": "renoise",
        "cfg": 1.0,
        "prediction": "flow",
        "family": "sd3",
        "base": "abc",
        "steps": 12,
        "config": {"train": {"betas": [0.0, 0.99]}},
    }
    save_lora(tmp_path / "s.safetensors", state, description)
    _, raw = load_tensors(tmp_path / "s.safetensors")
    assert raw["turbo_distill.sigmas"] == "[1.0, 0.5]" and raw["turbo_distill.sampler"] == "renoise"
    loaded, read = read_lora(tmp_path / "s.safetensors")
    assert read == {**description, "format": "1"}
    assert torch.equal(loaded["transformer.a.lora_A.weight"], state["transformer.a.lora_A.weight"])


def test_a_lora_of_others_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors", {"modelspec.title": "another"})
    with pytest.raises(ValueError, match="no turbo_distill metadata"):
        read_lora(tmp_path / "s.safetensors")


def test_the_fingerprint_tells_models_apart(make_network):
    plain = fingerprint(ToyNetwork())
    assert plain == fingerprint(ToyNetwork()) and plain != fingerprint(ToyNetwork(seed=1))
    tuned = ToyNetwork()
    with torch.no_grad():
        tuned.blocks[2].outlet.bias += 1e-3
    assert fingerprint(tuned) != plain
    assert fingerprint(make_network("sd3")) != fingerprint(make_network("sd3", num_layers=2))


def test_a_digest_of_weights_is_that_of_files_already_written():
    """Students, datasets and checkpoints name their base model by it: it must not change between versions."""
    tensors = {"b": torch.arange(40.0).view(2, 20) / 7, "a": torch.ones(3).half()}
    assert (
        weights_digest(tensors) == weights_digest({k: v.bfloat16() for k, v in tensors.items()}) == "285780347985ac7e"
    )
    network = torch.nn.Linear(2, 3)
    assert fingerprint(network) == weights_digest(network.state_dict()) != weights_digest({})


@pytest.mark.parametrize("size", [0, 100, SAMPLE_BYTES, 50_000, 1_000_000])
def test_a_files_digest_tells_sizes_and_contents_apart(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    digest = file_digest(path)
    assert len(digest) == 16 and digest == file_digest(path)
    path.write_bytes(bytes(size + 1))
    assert file_digest(path) != digest
    for changed in {0, size // 2 if size <= SAMPLE_BYTES else size - 1} if size else ():
        path.write_bytes(bytes(changed) + b"x" + bytes(size - changed - 1))
        assert file_digest(path) != digest
