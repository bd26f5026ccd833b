import json
import re
import struct
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import CHANNELS, LEVELS, ToyBackend, cache_toy, toy_conds

from distill_core.data.cache import CacheConfig, cache_latents, group_in_turn, groups_by_length, teacher_grid
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.samplers import sample_euler
from distill_core.models.denoiser import Cond, Denoiser, Guided


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    cache_toy(path)
    return path


@pytest.fixture
def dataset(folder):
    return LatentDataset(folder)


def everything(dataset):
    return dataset.read([place for bucket in dataset.buckets.values() for place in bucket])


def test_items_come_back_with_their_conditioning_and_noise(dataset):
    batch = everything(dataset)
    cond, empty = toy_conds()
    rows = [i % 3 for i in range(16)]
    assert len(dataset) == 16 and dataset.shapes == [(CHANNELS, 4, 6)]
    assert torch.equal(batch.cond.context, cond.context[rows]) and torch.equal(batch.cond.pooled, cond.pooled[rows])
    assert torch.equal(dataset.uncond().context, empty.context)
    assert batch.state_sigmas == LEVELS and batch.states.shape == (16, 4, CHANNELS, 4, 6)
    assert torch.equal(batch.states[:, 0], ItemNoise(0, range(16)).normal(CHANNELS, 4, 6))  # level 1 is pure noise


def test_an_item_does_not_depend_on_its_shard_or_batch(dataset, tmp_path):
    other = everything(cache_toy(tmp_path, batch_size=3, shard_size=5))
    torch.testing.assert_close(other.latents, everything(dataset).latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.states, everything(dataset).states, atol=1e-5, rtol=0)


def test_seed_and_conditioning_change_every_item(dataset, tmp_path):
    latents = everything(dataset).latents
    cond, _ = toy_conds()
    for folder, change in (("seed", {"seed": 1}), ("conds", {"conds": cond[[1, 2, 0]]})):
        other = everything(cache_toy(tmp_path / folder, **change)).latents
        assert (other - latents).flatten(1).abs().amax(1).min() > 0.01


@pytest.mark.parametrize("level", [0, 2])
def test_the_stored_states_lie_on_the_path_to_the_latent(dataset, level):
    item = dataset.read([(1, 3)])
    grid = teacher_grid(FlowProcess(), CacheConfig(steps=8, state_sigmas=LEVELS))
    rest = grid[grid <= LEVELS[level] + 1e-6]
    teacher = Guided(Denoiser(ToyBackend()), dataset.uncond(), 2.0)
    end = sample_euler(teacher, item.states[:, level], rest, {"cond": item.cond}, disable=True)
    torch.testing.assert_close(end, item.latents, atol=1e-5, rtol=0)
    assert not torch.allclose(item.states[:, 0], item.latents, atol=0.1)


@pytest.mark.parametrize("process", [FlowProcess(shift_alpha=3.0), DiscreteProcess(cumulative_alphas())])
def test_the_teacher_grid_holds_every_stored_level_once(process):
    wanted = (process.sigma_max, 0.7, 0.3)
    grid = teacher_grid(process, CacheConfig(steps=10, state_sigmas=wanted)).tolist()
    assert all(sum(abs(s - w) <= 1e-4 * w for s in grid) == 1 for w in wanted)
    assert len(grid) == 13 and grid == sorted(grid, reverse=True) and grid[-1] == 0


def test_masks_and_extra_tensors_of_a_conditioning_are_stored(tmp_path):
    plain = toy_conds()[0]
    mask = torch.ones(plain.context.shape[:2])
    mask[0, 1:] = 0
    cond = Cond(plain.context, plain.pooled, mask=mask, extra={"size": torch.tensor([8.0, 9.0, 10.0])})
    empty = Cond(plain.context[:1], plain.pooled[:1], mask=mask[:1], extra={"size": torch.tensor([7.0])})
    teacher = Guided(Denoiser(ToyBackend()), empty, 2.0)
    for _ in cache_latents(teacher, cond, 4, CacheConfig(count=3, steps=2, sizes=((4, 6),)), tmp_path):
        pass
    dataset = LatentDataset(tmp_path)
    (places,) = dataset.buckets.values()
    found = dataset.read(places).cond
    assert torch.equal(found.mask, mask) and found.extra["size"].tolist() == [8, 9, 10]
    assert dataset.uncond().extra["size"].tolist() == [7]


def test_sizes_take_turns_and_batches_hold_one_each(tmp_path):
    dataset = cache_toy(tmp_path, count=24, shard_size=4, sizes=((4, 6), (6, 4), (8, 2)), state_sigmas=())
    assert dataset.shapes == [(CHANNELS, 4, 6), (CHANNELS, 6, 4), (CHANNELS, 8, 2)]
    shapes = [tuple(dataset.batch(i, 4, seed=0).latents.shape[1:]) for i in range(12)]
    assert sorted(shapes[:6]) == sorted(dataset.shapes * 2) and sorted(shapes[6:]) == sorted(dataset.shapes * 2)
    assert shapes[:6] != sorted(shapes[:6]) or shapes[6:] != sorted(shapes[6:])  # the sizes are mixed
    assert dataset.batch(0, 4, 0).states is None


def keys_of(batch):
    return [row.tobytes() for row in batch.latents.numpy()]


def test_each_item_comes_once_an_epoch_in_an_order_of_the_seed(dataset):
    epochs = [[k for i in range(4 * e, 4 * e + 4) for k in keys_of(dataset.batch(i, 4, seed=1))] for e in range(2)]
    assert len(set(epochs[0])) == 16 and set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    again = LatentDataset(dataset.folder)
    assert keys_of(again.batch(6, 4, seed=1)) == epochs[1][8:12]
    assert keys_of(again.batch(6, 4, seed=2)) != epochs[1][8:12]


def test_rows_share_out_a_batch(dataset):
    whole = keys_of(dataset.batch(5, 8, seed=3))
    parts = [keys_of(dataset.batch(5, 8, 3, (rank, 4))) for rank in range(4)]
    assert sum(parts, []) == whole


def test_a_bucket_smaller_than_a_batch_is_repeated(dataset):
    keys = keys_of(dataset.batch(0, 40, seed=0))
    assert len(keys) == 40 and {keys.count(k) for k in keys} <= {2, 3}


def test_half_precision_is_for_the_files_only(dataset, tmp_path):
    small = everything(cache_toy(tmp_path, dtype="bfloat16"))
    assert load_file(tmp_path / "shard-00000.safetensors")["latents"].dtype == torch.bfloat16
    assert small.latents.dtype == torch.float32
    torch.testing.assert_close(small.latents, everything(dataset).latents, atol=0.02, rtol=0.01)


def test_reading_a_row_does_not_load_the_shard(tmp_path):
    """A shard of 512 MB (a sparse file): after one row the process has grown by far less."""
    rows, size = 128, 16 * 256 * 256 * 4
    header = {
        "latents": {"dtype": "F32", "shape": [rows, 16, 256, 256], "data_offsets": [0, rows * size]},
        "context": {"dtype": "F32", "shape": [rows, 1, 1], "data_offsets": [rows * size, rows * (size + 4)]},
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "shard-00000.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rows * (size + 4))
    before = psutil.Process().memory_info().rss
    batch = LatentDataset(tmp_path).read([(0, 77)])
    grown = psutil.Process().memory_info().rss - before
    assert batch.latents.shape == (1, 16, 256, 256) and grown < 100e6


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(change):
    def damage(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


DAMAGES = {
    "truncated": (cut, "truncated"),
    "no safetensors file": (lambda path: path.write_text("hello"), "not a safetensors file"),
    "foreign": (lambda path: save_file({"weight": torch.zeros(2)}, path), "not a shard"),
    "counts": (edit(lambda t: t.update(context=t["context"][:-1].clone())), "differ in count"),
    "no items": (edit(lambda t: t.update({name: value[:0] for name, value in t.items()})), "without items"),
    "context without tokens": (edit(lambda t: t.update(context=t["context"][:, 0].clone())), r"\[N, tokens, width\]"),
    "video": (edit(lambda t: t.update(latents=t["latents"].unsqueeze(2).contiguous())), r"\[N, C, H, W\]"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named_when_the_dataset_is_opened(tmp_path, damage, message):
    cache_toy(tmp_path)
    damage(tmp_path / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=rf"shard-00001.*{message}"):
        LatentDataset(tmp_path)


def test_states_go_with_their_levels_whatever_order_the_file_names_them_in(tmp_path):
    """Datasets of before could name them rising; their states are in the order of the path all the same."""
    dataset = cache_toy(tmp_path)
    path, levels = tmp_path / "shard-00000.safetensors", dataset.state_sigmas
    assert len(levels) > 1 and list(levels) == sorted(levels, reverse=True)
    save_file(load_file(path), path, {"state_sigmas": json.dumps(levels[::-1])})
    assert LatentDataset(tmp_path).state_sigmas == levels


@pytest.mark.parametrize("said", ["no json", '["a"]', "[1.0, 0.5, 0.25, 0.125, 0.0625]", "3"])
def test_levels_that_a_shard_does_not_hold_are_named(tmp_path, said):
    cache_toy(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    save_file(load_file(path), path, {"state_sigmas": said})
    with pytest.raises(ValueError, match="shard-00000.* is damaged: .*levels|shard-00000.* is damaged: state_sigmas"):
        LatentDataset(tmp_path)


def test_nan_latents_are_refused_with_their_place(tmp_path):
    cache_toy(tmp_path)
    edit(lambda t: t["latents"][5, 0, 0].fill_(float("nan")))(tmp_path / "shard-00001.safetensors")
    dataset = LatentDataset(tmp_path)
    with pytest.raises(ValueError, match="shard-00001.* row 5"):
        everything(dataset)
    dataset.read([(1, 4)])


def test_a_teacher_that_gives_nan_writes_nothing(tmp_path):
    cond, _ = toy_conds()
    with pytest.raises(ValueError, match="non-finite latents for items 0-7"):
        cache_toy(tmp_path, conds=cond.map(lambda value: value * float("nan")))
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize("change", [{"guidance": 3.0}, {"seed": 1}, {"description": {"base": "another"}}])
def test_a_folder_with_another_dataset_is_refused(folder, change):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}
    with pytest.raises(ValueError, match=f"other settings .{next(iter(change)).replace('description', 'base')} is"):
        cache_toy(folder, **change)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*")} == before


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no shards in {re.escape(str(tmp_path))}"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("bad", [{"count": 0}, {"batch_size": 0}, {"steps": 0}, {"dtype": "int8"}, {"sizes": ()}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        CacheConfig(**bad)


def test_prompts_of_one_length_share_a_batch_and_every_length_gets_its_share():
    conds = [Cond(torch.zeros(1, 77 if i % 4 else 154, 8)) for i in range(12)]
    groups = groups_by_length(conds)
    assert sorted(map(sorted, groups)) == [[0, 4, 8], [1, 2, 3, 5, 6, 7, 9, 10, 11]]
    turns = [len(group_in_turn(turn, groups)) for turn in range(40)]
    assert turns.count(9) == 30 and turns.count(3) == 10 and set(turns[:4]) == {3, 9}
    assert group_in_turn(7, [[0, 1]]) == [0, 1]
