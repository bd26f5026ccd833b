"""A dataset that was stopped anywhere, damaged, or is to be larger becomes the one that is made at once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import CHANNELS, ToyBackend, cache_toy, toy_conds

from distill_core.data.cache import CacheConfig, cache_latents, write_shards
from distill_core.data.dataset import LatentDataset
from distill_core.data.real import save_latents
from distill_core.models.denoiser import Denoiser, Guided

SMALL = dict(steps=4, state_sigmas=(), shard_size=12, batch_size=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def stop_after(folder: Path, batches: int, **changes) -> None:
    """A dataset of 20 that is given up after some batches."""
    cond, empty = toy_conds()
    config = CacheConfig(**{"count": 20, "sizes": ((4, 6),), "guidance": 2.0, **SMALL, **changes})
    made = cache_latents(Guided(Denoiser(ToyBackend()), empty, 2.0), cond, CHANNELS, config, folder)
    for _ in range(batches):
        next(made)
    made.close()


def latents(dataset: LatentDataset) -> torch.Tensor:
    return torch.cat([load_file(path)["latents"] for path in dataset.paths])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return cache_toy(tmp_path_factory.mktemp("whole"), count=20, **SMALL).folder


@pytest.mark.case("training 7", "a dataset goes on after a stop at any batch, to the same bytes")
@pytest.mark.parametrize("batches", range(1, 6))
def test_a_stop_loses_at_most_a_batch(tmp_path, whole, batches):
    stop_after(tmp_path, batches)
    held = LatentDataset(tmp_path)
    assert len(held) == 4 * batches and torch.equal(latents(held), latents(LatentDataset(whole))[: 4 * batches])
    cond, empty = toy_conds()
    config = CacheConfig(count=20, sizes=((4, 6),), guidance=2.0, **SMALL)
    teacher = Guided(Denoiser(ToyBackend()), empty, 2.0)
    told = list(cache_latents(teacher, cond, CHANNELS, config, tmp_path))
    made = [len(batch) for _, _, batch in told if batch is not None]
    assert sum(made) == 20 - 4 * batches and told[-1][:2] == (20, 20)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.case("training D6", "a dataset goes on with another batch_size and to a larger count")
@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 64])
def test_another_batch_size_goes_on(tmp_path, whole, size):
    stop_after(tmp_path, 2)
    before = latents(LatentDataset(tmp_path))
    dataset = cache_toy(tmp_path, count=20, **{**SMALL, "batch_size": size})
    assert {path.name for path in dataset.paths} == {path.name for path in LatentDataset(whole).paths}
    torch.testing.assert_close(latents(dataset), latents(LatentDataset(whole)), rtol=0, atol=1e-5)
    kept = 8 - 8 % size if size > 4 else 8
    assert torch.equal(latents(dataset)[:kept], before[:kept])


@pytest.mark.parametrize("first", [1, 4, 6, 12, 13, 19])
def test_a_larger_count_gives_the_same_items_as_if_it_had_been_asked_at_once(tmp_path, whole, first):
    cache_toy(tmp_path, count=first, **SMALL)
    cache_toy(tmp_path, count=20, **SMALL)
    assert contents(tmp_path) == contents(whole)


def test_a_larger_count_of_several_sizes_is_laid_out_as_at_once(tmp_path):
    sizes = dict(sizes=((4, 6), (6, 4)), shard_size=4, state_sigmas=(1.0,), batch_size=4)
    cache_toy(tmp_path / "grown", count=5, **sizes)
    # Another shard_size does not move the items of a dataset that is there.
    cache_toy(tmp_path / "grown", count=18, **{**sizes, "shard_size": 9})
    cache_toy(tmp_path / "once", count=18, **sizes)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")


def test_a_smaller_count_keeps_what_is_there_and_says_so(tmp_path, caplog, whole):
    cache_toy(tmp_path, count=20, **SMALL)
    with caplog.at_level(logging.WARNING):
        assert len(cache_toy(tmp_path, count=8, **SMALL)) == 20
    assert "already holds 20 latents, and count is 8: all are kept" in caplog.text
    assert contents(tmp_path) == contents(whole)


def test_a_stopped_dataset_can_be_called_done(tmp_path):
    stop_after(tmp_path, 2)
    assert len(cache_toy(tmp_path, count=8, **SMALL)) == 8
    assert LatentDataset(tmp_path).manifest()["config"]["count"] == 8


def rewrite(change):
    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    return damage


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    "foreign": (lambda path: path.write_text("hello"), "truncated or not"),
    "empty": (lambda path: save_file({}, path), "latents is missing"),
    "key gone": (rewrite(lambda t: t.pop("context")), "context is missing"),
    "NaN": (rewrite(lambda t: t["pooled"][1].fill_(float("nan"))), "pooled has values that are not finite"),
    "no rows": (rewrite(lambda t: t.update({k: v[:0] for k, v in t.items()})), "rows where 12 are wanted"),
    "counts": (rewrite(lambda t: t.update(context=t["context"][1:])), "rows where 12 are wanted"),
    "too many": (rewrite(lambda t: t.update({k: torch.cat([v, v]) for k, v in t.items()})), "rows where 12 are wanted"),
    "other size": (rewrite(lambda t: t.update(latents=t["latents"].transpose(2, 3))), "[N, C, 4, 6] is wanted"),
}


@pytest.mark.case("attack 18", "a damaged shard is named and its items are made again")
@pytest.mark.parametrize("damage, said", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named_and_made_again(tmp_path, whole, caplog, damage, said):
    cache_toy(tmp_path, count=20, **SMALL)
    damage(tmp_path / "shard-00000.safetensors")
    with caplog.at_level(logging.WARNING):
        cache_toy(tmp_path, count=20, **SMALL)
    (record,) = caplog.records
    assert "shard-00000" in record.message and "are made again" in record.message
    assert said in record.message
    assert contents(tmp_path) == contents(whole)


def test_a_damaged_part_is_made_again(tmp_path, whole, caplog):
    stop_after(tmp_path, 2)
    part = tmp_path / "shard-00000.part-00004.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    cache_toy(tmp_path, count=20, **SMALL)
    assert "part-00004" in caplog.text and contents(tmp_path) == contents(whole)


def test_a_missing_shard_is_made_again_and_others_are_not(tmp_path, whole):
    cache_toy(tmp_path, count=20, **SMALL)
    kept = tmp_path / "shard-00001.safetensors"
    before = kept.stat().st_mtime_ns
    (tmp_path / "shard-00000.safetensors").unlink()
    cache_toy(tmp_path, count=20, **SMALL)
    assert kept.stat().st_mtime_ns == before and contents(tmp_path) == contents(whole)


def test_a_shard_that_may_not_be_read_is_no_damage(tmp_path):
    cache_toy(tmp_path, count=20, **SMALL)
    path = tmp_path / "shard-00000.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="shard-00000.safetensors is a folder where a file is wanted"):
        cache_toy(tmp_path, count=20, **SMALL)


def test_shards_that_nothing_is_said_about_are_refused(tmp_path):
    cache_toy(tmp_path, count=20, **SMALL)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ValueError, match="holds shards, and no dataset.json .*: delete the folder, or choose another"):
        cache_toy(tmp_path, count=20, **SMALL)


def test_a_dataset_of_before_keeps_its_manifest_to_the_byte(tmp_path):
    """So a run on it goes on: the dataset's digest is that of before."""
    cache_toy(tmp_path, {"base": "x"}, count=20, **SMALL)
    path = tmp_path / "dataset.json"
    text = json.dumps(json.loads(path.read_text()), indent=4)
    path.write_text(text)
    digest = LatentDataset(tmp_path).digest()
    cache_toy(tmp_path, {"base": "x"}, count=20, **{**SMALL, "batch_size": 7, "shard_size": 5})
    assert path.read_text() == text and LatentDataset(tmp_path).digest() == digest


@pytest.mark.case("host D5", "the refusal of a dataset names each setting that differs, with both values")
def test_the_refusal_names_everything_that_differs(tmp_path):
    cache_toy(tmp_path, {"base": "mine"}, count=20, **SMALL)
    with pytest.raises(ValueError) as refused:
        cache_toy(tmp_path, {"base": "yours"}, count=40, **{**SMALL, "steps": 8, "batch_size": 1}, seed=3)
    assert f"{tmp_path} holds a dataset made with other settings (base is another one now; " in str(refused.value)
    assert "(base is another one now; seed is 3 now, was 0; steps is 8 now, was 4); choose" in str(refused.value)


def test_another_negative_prompt_is_refused(tmp_path):
    cache_toy(tmp_path, count=20, **SMALL)
    _, empty = toy_conds()
    config = CacheConfig(count=20, sizes=((4, 6),), guidance=2.0, **SMALL)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="negative is another one now"):
        list(write_shards(lambda items, shard: {}, empty.map(lambda value: value + 1), 2.0, config, tmp_path))
    assert contents(tmp_path) == before


def test_pictures_and_teachers_latents_do_not_mix_in_one_folder(tmp_path):
    cond, empty = toy_conds()
    save_latents([torch.randn(CHANNELS, 4, 6)], [cond[:1]], empty, tmp_path)
    with pytest.raises(ValueError, match="kind is latents of a teacher now, was pictures"):
        cache_toy(tmp_path)


@pytest.mark.case("training 2b", "a picture dataset does not depend on the model's precision or its LoRAs")
def test_pictures_are_of_a_latent_space_and_not_of_a_model(tmp_path):
    cond, empty = toy_conds()
    pictures = [torch.randn(CHANNELS, 4, 6)]
    save_latents(pictures, [cond[:1]], empty, tmp_path, {"family": "toy", "base": "a model of before"})
    before = contents(tmp_path)
    save_latents(pictures, [cond[:1]], empty, tmp_path, {"family": "toy"})
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="family is other now, was toy"):
        save_latents(pictures, [cond[:1]], empty, tmp_path, {"family": "other"})


SLOW = """
import sys, time
from toy import *
from test_going_on import SMALL
import distill_core.data.cache as cache
made = cache._sample_batch
def slow(*args):
    time.sleep(0.05)
    return made(*args)
cache._sample_batch = slow
cache_toy(sys.argv[1], count=20, **SMALL)
"""


def test_a_killed_process_leaves_what_goes_on_to_the_same_bytes(tmp_path, whole):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1])]
    program = f"import sys; sys.path[:0] = {paths!r}\n{SLOW}"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
        count = len(list(tmp_path.glob("shard-*")))
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("shard-*"))) == count and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert 0 < len(LatentDataset(tmp_path)) < 20
    cache_toy(tmp_path, count=20, **SMALL)
    assert contents(tmp_path) == contents(whole)
