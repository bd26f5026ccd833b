import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy import ToyNetwork

from distill_core.digests import SAMPLE_BYTES, file_digest, fingerprint, weights_digest
from distill_core.files import alone_in, load_tensors, read_text, save_json, save_tensors
from distill_core.lora_files import read_lora, save_lora


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
        save_tensors(tmp_path / "run.safetensors", tensors, metadata)
        save_json(tmp_path / "state.json", state)
        assert {path.name for path in tmp_path.iterdir()} == {"run.safetensors", "state.json"}


def test_the_same_content_is_the_same_bytes_in_every_process(tmp_path):
    """Text that JSON escapes in its own way among it: the sorted header is as long as the library's."""
    metadata = {f"key {i}": f'{i} "\\ \n\t\b\f\x01\x1f\x7f é 名 \U0001f600 \u2028' for i in range(9, -1, -1)} | {
        "é\n": ""
    }
    tensors = {"a": torch.ones(2), "名 \n": torch.zeros(1, dtype=torch.int64)}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata)
    header = (tmp_path / "a.safetensors").read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}"
    assert list(json.loads(header)["__metadata__"]) == sorted(metadata)
    loaded, texts = load_tensors(tmp_path / "a.safetensors")
    assert texts == metadata and loaded.keys() == tensors.keys() and loaded["a"].equal(tensors["a"])


@pytest.mark.parametrize("gone", ["lora_A", "lora_B"])
def test_a_lora_with_half_a_layer_is_refused_by_name(tmp_path, gone):
    state = {f"transformer.q.{name}.weight": torch.ones(2, 2) for name in ("lora_A", "lora_B")}
    save_lora(tmp_path / "a.safetensors", state, {"sigmas": [1.0]})
    assert read_lora(tmp_path / "a.safetensors")[0].keys() == state.keys()
    del state[f"transformer.q.{gone}.weight"]
    save_lora(tmp_path / "a.safetensors", state, {"sigmas": [1.0]})
    with pytest.raises(
        ValueError, match=f"a.safetensors is damaged: it has transformer.q.*and not transformer.q.{gone}"
    ):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("strengths", "words"),
    [
        ({"text_strength": [3, 7.5, 10]}, "its strengths are of .*text_strength.*, not of text and picture"),
        ({"text_strength": [3, 7.5, 10], "image_strength": [1, 2]}, r"its image_strength is \[1, 2\], not the lowest"),
        ({"text_strength": [3, "a", 10], "image_strength": [1, 1.5, 2]}, "its text_strength is .*, not the lowest"),
    ],
)
def test_strengths_that_make_no_sense_are_refused_by_name(tmp_path, strengths, words):
    save_lora(tmp_path / "a.safetensors", {}, {"sigmas": [1.0], "strengths": strengths})
    with pytest.raises(ValueError, match=f"a.safetensors is damaged: {words}"):
        read_lora(tmp_path / "a.safetensors")


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
    state = {f"transformer.a.lora_{name}.weight": torch.ones(2, 3) for name in "AB"}
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


class ShowsStandIns(torch.nn.Linear):
    """A layer as ComfyUI-GGUF's: its state has empty tensors on the meta device, and one that is no weight."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in ("weight", "bias"):
            destination[prefix + name] = getattr(self, name).detach().to("meta")
        destination[prefix + "temp.weight"] = torch.empty(1000, device="meta")


@pytest.mark.case("memory 5.2", "a network whose state shows stand-ins without data (GGUF) is known by its parameters")
def test_weights_that_their_state_does_not_show_are_known_by_the_parameters():
    def network(kind, shift: float = 0.0):
        torch.manual_seed(0)
        layer = kind(3, 2)
        with torch.no_grad():
            layer.weight.add_(shift)
        return torch.nn.Sequential(layer, torch.nn.BatchNorm1d(2))

    plain = fingerprint(network(torch.nn.Linear))
    assert fingerprint(network(ShowsStandIns)) == plain != fingerprint(network(ShowsStandIns, 0.5))


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


def hold(folder: Path, ready, end) -> None:
    with alone_in(folder, "training"):
        ready.set()
        end.wait(60)


@pytest.mark.case("training D14", "a second process in a run's folder is refused; a dead one's lock is free")
@pytest.mark.case("attack 14", "two runs in one folder: the second is refused")
@pytest.mark.parametrize("killed", [False, True])
def test_one_process_works_in_a_folder_and_a_dead_one_holds_nothing(tmp_path, killed):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready, end))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=rf"another process \(number {process.pid} on .+\) is training in .+run: wait"):
        with alone_in(tmp_path / "run", "training"):
            raise AssertionError("two in one folder")
    process.kill() if killed else end.set()
    process.join()
    with alone_in(tmp_path / "run", "training"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_folder_is_free_again_after_an_error_in_this_process(tmp_path):
    with pytest.raises(KeyError):
        with alone_in(tmp_path, "caching"):
            with pytest.raises(ValueError, match="is caching in"):
                with alone_in(tmp_path, "caching"):
                    pass
            raise KeyError
    with alone_in(tmp_path, "caching"):
        pass


@pytest.mark.case("training D11", "text is UTF-8 with or without a byte order mark, whatever the locale")
def test_text_is_utf8_with_or_without_a_mark_and_any_line_ends(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "p.txt").write_bytes(mark + "ein Fuchs, grün\r\n狐\r".encode())
        assert read_text(tmp_path / "p.txt") == "ein Fuchs, grün\n狐\n"


@pytest.mark.case("training D11", "a file in another encoding is named with its line and what to do")
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("a\nb\ngrün".encode("latin-1"), r"p.txt is not UTF-8 text \(byte 0xfc in line 3\); save it as UTF-8"),
        ("fox".encode("utf-16"), r"p.txt is not UTF-8 text \(UTF-16\); save it as UTF-8"),
    ],
)
def test_another_encoding_is_named(tmp_path, raw, message):
    (tmp_path / "p.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "p.txt")


@pytest.mark.case("attack 5", "what cannot be read is told as that, not as truncated")
@pytest.mark.parametrize("read", [read_text, load_tensors])
def test_a_file_that_may_not_be_read_is_told_as_that(tmp_path, read, monkeypatch):
    with pytest.raises(ValueError, match="there is no file .*gone"):
        read(tmp_path / "gone")
    with pytest.raises(ValueError, match="is a folder where a file is wanted"):
        read(tmp_path)

    def forbidden(*args, **more):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine").write_bytes(b"")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    monkeypatch.setattr("distill_core.files.safe_open", forbidden)
    with pytest.raises(ValueError, match=r"mine may not be read by this user \(permission denied\)"):
        read(tmp_path / "mine")


@pytest.mark.case("attack 5", "a file that is written has the mode that the umask gives, not the owner's only")
def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        save_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
