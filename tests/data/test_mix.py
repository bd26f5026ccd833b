"""Several datasets as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import CHANNELS, cache_toy, toy_conds, toy_run

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.data.fits import check_teacher
from distill_core.data.held_out import hold_out
from distill_core.data.mix import DataConfig, MixedDataset, mixed, new_mix, open_data
from distill_core.data.real import save_latents
from distill_core.methods.ladd import LADDConfig
from distill_core.training.loop import train


def pictures(folder: Path, count: int = 5, size=(CHANNELS, 4, 6), **description) -> Path:
    cond, empty = toy_conds()
    g = torch.Generator().manual_seed(count)
    latents = [torch.randn(size, generator=g) for _ in range(count)]
    save_latents(latents, [cond[i % 3 : i % 3 + 1] for i in range(count)], empty, folder, description)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("mix")
    teacher = cache_toy(root / "teacher", {"base": "mine"}).folder
    return pictures(root / "own"), teacher


@pytest.fixture
def dataset(folders) -> MixedDataset:
    return open_data(mixed(*folders, 0.25))


def of_teacher(batch) -> bool:
    return batch.states is not None


@pytest.mark.case("training 5.2", "datasets mix with weights: own pictures and the teacher's samples")
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
def test_batches_take_turns_by_their_shares(folders, share):
    dataset = open_data(mixed(*folders, share))
    turns = [of_teacher(dataset.batch(n, 4, 0)) for n in range(100)]
    assert sum(turns) == pytest.approx(100 * share, abs=1)
    for end in range(10, 100):
        assert abs(sum(turns[:end]) - share * end) <= 1.01


def test_each_dataset_has_its_own_epochs(folders, dataset):
    own, teacher = (LatentDataset(folder) for folder in folders)
    numbers = {True: 0, False: 0}
    for n in range(40):
        batch = dataset.batch(n, 4, seed=3)
        kind = of_teacher(batch)
        expected = (teacher if kind else own).batch(numbers[kind], 4, seed=3)
        numbers[kind] += 1
        assert torch.equal(batch.latents, expected.latents) and torch.equal(batch.cond.context, expected.cond.context)
        assert batch.states is None or torch.equal(batch.states, expected.states)
    assert numbers[True] == 10


def test_any_batch_can_be_asked_for_at_any_time(folders, dataset):
    again = open_data(mixed(*folders, 0.25))
    for n in (37, 2, 11):
        assert torch.equal(again.batch(n, 4, 1).latents, dataset.batch(n, 4, 1).latents)
    whole = dataset.batch(5, 4, 1).latents
    assert torch.equal(torch.cat([dataset.batch(5, 4, 1, (part, 2)).latents for part in range(2)]), whole)


def test_it_says_of_itself_what_the_teachers_dataset_says(folders, dataset):
    teacher = LatentDataset(folders[1])
    assert len(dataset) == 21 and dataset.shapes == [(CHANNELS, 4, 6)] and dataset.state_sigmas == teacher.state_sigmas
    assert dataset.manifest()["guidance"] == 2.0 and dataset.folder.name == "own + teacher"
    assert torch.equal(dataset.uncond().context, teacher.uncond().context)


def test_members_and_shares_decide_what_it_is(folders, tmp_path):
    digests = [open_data(mixed(*folders, share)).digest() for share in (0.25, 0.5)]
    other = pictures(tmp_path / "own", 6)
    digests.append(open_data(mixed(other, folders[1], 0.25)).digest())
    assert len({*digests}) == 3 and open_data(mixed(*folders, 0.25)).digest() == digests[0]
    assert open_data(new_mix({folders[0]: 3, folders[1]: 1})).digest() == digests[0]
    thirds = [new_mix({folders[0]: a, folders[1]: b}) for a, b in ((1, 2), (0.1, 0.2), (0.7, 1.4), (1e-6, 2e-6))]
    assert len({*thirds}) == 1


def test_mixes_of_mixes_and_of_one_dataset(folders, tmp_path):
    third = pictures(tmp_path / "third", 4)
    mix = mixed(mixed(*folders, 0.5), third, 0.2)
    assert [share for _, share in mix.parts] == pytest.approx([0.4, 0.4, 0.2])
    assert mixed(folders[0], mixed(*folders, 0.5), 0.5).parts[0] == (folders[0], 0.75)
    assert type(open_data(mixed(folders[0], folders[0], 0.3))) is LatentDataset
    assert open_data(folders[0]).members[0].folder == folders[0]


def test_what_cannot_be_mixed_is_named_with_both_values(folders, tmp_path):
    other = cache_toy(tmp_path / "levels", state_sigmas=(1.0, 0.5)).folder
    with pytest.raises(ValueError, match=r"teacher keeps pairs at \[1.0, .*levels at \[1.0, 0.5\]: mix datasets"):
        open_data(mixed(folders[1], other, 0.5))
    plain = cache_toy(tmp_path / "guided", state_sigmas=()).folder
    path = plain / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance": 3.0}))
    with pytest.raises(ValueError, match="sampled at guidance 2 and .*guided at 3: mix datasets of one guidance"):
        open_data(mixed(folders[1], plain, 0.5))
    with pytest.raises(ValueError, match="mix.a must be above 0"):
        DataConfig({"a": 0.0})


def test_pairs_of_another_teacher_are_found_in_a_mix(dataset):
    check_teacher(dataset, "mine")
    with pytest.raises(ValueError, match="the pairs in .*teacher are paths of another model"):
        check_teacher(dataset, "yours")


PAIRS = LADDConfig(terms={"adversarial": 1.0, "pairs": 1.0}, student_sigmas=(1.0, 0.75, 0.5, 0.25), warmup_steps=0)


def test_pairs_count_only_where_there_are_some(dataset):
    kinds = [of_teacher(dataset.batch(n, 4, 0)) for n in range(8)]
    logs = [event.logs for event in train(toy_run(dataset, ladd=PAIRS, steps=8))]
    assert ["pairs" in entry for entry in logs] == kinds and 0 < sum(kinds) < 8
    assert not kinds[0]  # the first batch has none, and the run is not refused for it
    assert all(entry["pairs"] > 0 for entry, kind in zip(logs, kinds, strict=True) if kind)


def test_pairs_that_no_member_keeps_are_refused(folders, tmp_path):
    dataset = open_data(mixed(folders[0], pictures(tmp_path / "more", 4), 0.5))
    with pytest.raises(ValueError, match="needs a dataset with stored states"):
        next(train(toy_run(dataset, ladd=PAIRS)))


def test_a_mixed_run_resumes_to_the_same_weights(dataset, tmp_path):
    whole = toy_run(dataset, tmp_path / "whole", ladd=PAIRS, steps=6)
    list(train(whole))
    for event in train(toy_run(dataset, tmp_path / "parts", ladd=PAIRS, steps=6)):
        if event.step == 3:
            break
    rest = toy_run(open_data(dataset.mix), tmp_path / "parts", ladd=PAIRS, steps=6)
    list(train(rest))
    for name, value in whole.student_parameters.items():
        assert torch.equal(value, rest.student_parameters[name])


def test_items_are_held_out_of_every_member(dataset):
    rest, held_out = hold_out(dataset, 6, seed=0)
    assert (len(rest), len(held_out)) == (15, 6)
    batches = [rest.batch(n, 2, 0) for n in range(30)]
    kept = {row.tobytes() for items in held_out.buckets.values() for row in held_out.read(items).latents.numpy()}
    seen = {row.tobytes() for batch in batches for row in batch.latents.numpy()}
    assert len(kept) == 6 and not kept & seen and {of_teacher(batch) for batch in batches} == {True, False}


# The command

CONFIG = """
[model]
lora_rank = 2
[cache]
count = 8
steps = 2
guidance = 1.5
sizes = [[8, 8]]
[train]
steps = 2
batch_size = 2
warmup_steps = 1
preflight = false
"""


def test_the_command_takes_a_mix_from_the_file(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(CONFIG)
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.toml").write_text(CONFIG.replace("count = 8", f"count = 8\nseed = {seed}"))
        assert main(["cache", str(tmp_path / f"{name}.toml"), "--out", str(tmp_path / name)]) == 0
    mix = f"\n[data]\nmix = {{ '{tmp_path / 'a'}' = 1, '{tmp_path / 'b'}' = 3 }}\n"
    (tmp_path / "mix.toml").write_text(CONFIG + mix)
    train = ["train", str(tmp_path / "mix.toml"), "--out", str(tmp_path / "run")]
    assert main(train) == 0 and (tmp_path / "run" / "student.safetensors").exists()
    capsys.readouterr()
    assert main([*train, "--data", str(tmp_path / "a")]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "x")]) == 2
    assert "give --data FOLDER, or several folders with weights in [data] mix" in capsys.readouterr().err
    (tmp_path / "mix.toml").write_text(
        (CONFIG + mix.replace("= 3", "= 2")).replace("steps = 2\nbatch", "steps = 3\nbatch")
    )
    assert main(train) == 2
    assert "--data (or [data] mix) is another one now" in capsys.readouterr().err
