"""LADD Trainer in the real server: what it reaches, cancel, resume, a killed server, memory, mistakes, a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from graphs import mini_training, node, student_score, teacher_score
from run_files import assert_same_files, fails, log_of, lora_of, run_folder, steps_of, wait_for_step
from safetensors.torch import load_file
from server import Host, failure_text, run_probe

from distill_core.files import load_tensors
from distill_core.lora_files import read_lora

# What it reaches


@pytest.fixture(scope="module")
def distilled(host) -> Host:
    """The mini model distilled into one step: 512 latents of an 8-step teacher, 30 steps of 16."""
    teacher = {"count": 512, "steps": 8, "batch_size": 128}
    graph = mini_training("one_step", "one_step", teacher, steps=30, batch_size=16, student_lr=1e-3, rank=32)
    graph["loss"] = node("LossGraphNode", loss=["train", 2], filename_prefix="one_step_loss")
    graph["core"] = node("SaveLoRA", lora=["train", 1], prefix="loras/one_step_core")
    host.run(graph, 600)
    return host


def test_one_step_of_the_student_is_far_better_than_one_of_the_teacher(distilled):
    """fd of the saved LoRA, loaded by core's loader and sampled by Turbo Sampler, against the guided teacher's.

    This run is a tenth of the length of the demo in tests/benchmarks/distil_in_graph.py, which also makes the picture.
    """
    before = len(distilled.log())
    scores = [student_score(distilled, "one_step_00001_.safetensors"), teacher_score(distilled)]
    said = distilled.log()[before:]
    assert "lora key not loaded" not in said and "NOT LOADED" not in said
    print("student", scores[0], "teacher", scores[1])
    assert scores[0]["fd"] <= 0.30 * scores[1]["fd"] and scores[0]["accuracy"] > 0.8


def test_every_way_to_the_lora_gives_the_same_weights(distilled):
    """The trainer's own file, Save Turbo LoRA's and core's SaveLoRA; the first two say how they are sampled."""
    loras = distilled.base_dir / "output" / "loras"
    own, said = read_lora(lora_of(distilled, "one_step"))
    saved, also = read_lora(loras / "one_step_00001_.safetensors")
    core = load_file(loras / "one_step_core_00001_.safetensors")
    assert own.keys() == saved.keys() == core.keys() and said == also
    assert all(torch.equal(own[name], saved[name]) and torch.equal(own[name], core[name]) for name in own)
    assert said["sigmas"] == [1.0] and said["sampler"] == "ancestral" and said["cfg"] == 1.0 and said["steps"] == 30


def test_the_log_has_every_step_and_the_report_is_an_image(distilled):
    log = log_of(distilled, "one_step")
    assert [entry["step"] for entry in log] == list(range(1, 31))
    assert {"adversarial", "pairs", "discriminator", "accuracy", "logit_gap"} <= log[0].keys()
    assert sum(entry["pairs"] for entry in log[-5:]) < sum(entry["pairs"] for entry in log[:5])


def test_a_finished_run_answers_from_its_files(distilled):
    """Queued again after the host has forgotten what it made, nothing is trained and nothing changes."""
    before = {
        path: path.stat().st_mtime_ns
        for path in (lora_of(distilled, "one_step"), run_folder(distilled, "one_step") / "checkpoint.safetensors")
    }
    distilled.forget()
    teacher = {"count": 512, "steps": 8, "batch_size": 128}
    graph = mini_training("one_step", "one_step", teacher, steps=30, batch_size=16, student_lr=1e-3, rank=32)
    started = cpu(distilled)
    distilled.run(graph, 300)
    assert cpu(distilled) - started < 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


def cpu(host: Host) -> float:
    """Processor seconds of the server: what counts on a machine that others use, too."""
    times = psutil.Process(host.process.pid).cpu_times()
    return times.user + times.system


# Cancel and resume


@pytest.mark.parametrize("train", ["LoRA", "all weights"])
def test_a_cancelled_run_stops_soon_and_goes_on_to_the_same_weights(host, train):
    whole, cut, settings = f"whole {train}", f"cut {train}", dict(steps=30, seed=1, train=train)
    host.run(mini_training(whole, **settings), 300)
    prompt = host.queue(mini_training(cut, **settings))
    wait_for_step(host, cut, random.randint(2, 20))
    before = cpu(host)
    host.post("/interrupt")
    entry = host.wait(prompt)
    spent = cpu(host) - before
    assert "interrupted in node train" in failure_text(entry)
    step, stopped = host_step_seconds(host, cut), len(steps_of(host, cut))
    print(f"stopped after step {stopped}, {spent:.2f} s of processor after the interrupt, {step:.2f} s a step")
    assert spent < 2 + step and 2 <= stopped < 30
    _, said = read_lora(lora_of(host, cut))
    assert said["steps"] == stopped, "a usable LoRA of the last step that ended"
    host.run(mini_training(cut, **settings), 300)
    assert steps_of(host, cut) == list(range(1, 31))
    assert_same_files(lora_of(host, cut), lora_of(host, whole))
    assert_same_files(*(run_folder(host, name) / "checkpoint.safetensors" for name in (cut, whole)))


def host_step_seconds(host: Host, name: str) -> float:
    folder = run_folder(host, name)
    return (time.time() - (folder / "started.json").stat().st_mtime) / max(1, len(steps_of(host, name)))


def test_a_run_can_be_made_longer_and_other_settings_are_refused(host):
    host.run(mini_training("longer", steps=3), 120)
    host.run(mini_training("longer", steps=5), 120)
    assert steps_of(host, "longer") == [1, 2, 3, 4, 5] and read_lora(lora_of(host, "longer"))[1]["steps"] == 5
    before = lora_of(host, "longer").read_bytes()
    text = fails(host, mini_training("longer", steps=6, student_lr=1e-4))
    assert "other settings (student_lr is 0.0001 now, was 0.0006); choose another run_name" in text
    assert lora_of(host, "longer").read_bytes() == before


@pytest.mark.case("host D7", "fewer steps under the same run name answers with the longer student, and says so")
def test_fewer_steps_than_were_done_are_told(host):
    host.run(mini_training("shorter", steps=4), 120)
    outputs = host.run(mini_training("shorter", steps=2), 120)["outputs"]
    assert "this run has already done 4 steps, and steps is 2 now" in outputs["train"]["text"][0]
    assert read_lora(lora_of(host, "shorter"))[1]["steps"] == 4


@pytest.mark.case("host D5", "what differs is named as the node has it, with both values")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rank=2), "rank (or train) is 2 now, was 4"),
        (dict(sampler="euler"), "sampler (or preset) is euler now, was ancestral"),
        (dict(loss="relativistic"), "loss is relativistic now, was hinge"),
        (dict(target_steps=2), "target_steps (or preset) is [1.0, 0.5] now, was [1.0]"),
        (dict(pairs_weight=1.0), "pairs_weight is 1 now, was 4"),
        (dict(lora_targets="attn"), "lora_targets is ['attn'] now, was left out"),
    ],
)
def test_changes_are_said_in_widgets(host, changes, said):
    """Steps are raised, so that the run would go on."""
    host.run(mini_training("changed", steps=2), 120)
    assert said in fails(host, mini_training("changed", steps=3, **changes))


@pytest.mark.case("host D5", "to start again is a choice on the node; nothing is lost")
def test_a_run_is_started_again_and_the_old_one_kept(host):
    host.run(mini_training("again", steps=4), 120)
    old = {name: path.read_bytes() for name, path in files_of(host, "again").items()}
    text = fails(host, mini_training("again", steps=4, student_lr=1e-4))
    assert "set existing_run to start again" in text
    graph = mini_training("again", steps=3, student_lr=1e-4, existing_run="start again")
    (said,) = host.run(graph, 120)["outputs"]["train"]["text"]
    assert "the run before, and its LoRA, are now called again_old1" in said
    assert {name: path.read_bytes() for name, path in files_of(host, "again_old1").items()} == old
    assert steps_of(host, "again") == [1, 2, 3] and read_lora(lora_of(host, "again"))[1]["steps"] == 3
    host.forget()
    (said,) = host.run(graph, 120)["outputs"]["train"]["text"]
    assert "with just these settings: it would become the same and is not done again" in said
    assert not run_folder(host, "again_old2").exists()


def files_of(host: Host, name: str) -> dict[str, Path]:
    folder = run_folder(host, name)
    return {"lora": lora_of(host, name), **{n: folder / n for n in ("checkpoint.safetensors", "log.jsonl")}}


@pytest.mark.case("host D6", "levels without pairs are named before the run")
def test_levels_without_pairs_are_told(host):
    outputs = host.run(mini_training("some_pairs", target_steps=2, steps=2), 120)["outputs"]
    (text,) = outputs["train"]["text"]
    assert "0.5 of 1, 0.5 have no pairs in few (it keeps 1)" in text and "pairs_for_steps = 2" in text


@pytest.mark.case("host D8", "queued again, a finished run answers from its files: no new report, no second LoRA")
def test_a_finished_run_draws_and_saves_nothing_again(host):
    graph = mini_training("quiet", vae=["mini", 1], preview_positive=["classes", 0], steps=2)
    first = host.run(graph, 120)["outputs"]
    kept = run_folder(host, "quiet") / "report.png"
    before = kept.stat().st_mtime_ns
    host.forget()
    second = host.run(graph, 120)["outputs"]
    assert kept.stat().st_mtime_ns == before
    assert "already holds this LoRA" in second["save"]["text"][0] and "saved" in first["save"]["text"][0]
    assert [path.name for path in (host.base_dir / "output" / "loras").glob("quiet_*")] == ["quiet_00001_.safetensors"]


@pytest.mark.case("host D8", "an unchanged finished workflow is not run again at all, until its files are gone")
def test_a_finished_workflow_is_not_run_again(host):
    graph = mini_training("cached", "cached", steps=2)
    host.run(graph, 120)
    assert executed(host, graph) == set()
    shutil.rmtree(host.base_dir / "output" / "turbo_distill" / "datasets" / "cached")
    assert executed(host, graph) == {"dataset", "train", "save"}
    assert executed(host, graph) == set()
    lora_of(host, "cached").unlink()
    assert executed(host, graph) == {"train", "save"}
    assert executed(host, graph) == set()


def executed(host: Host, graph: dict) -> set[str]:
    """The nodes that the host ran for a workflow, not answered from its cache."""
    messages = dict(host.run(graph, 120)["status"]["messages"])
    return graph.keys() - set(messages["execution_cached"]["nodes"])


@pytest.mark.case("attack 6", "a dataset whose folder was deleted is made again, whatever the run is called")
def test_a_deleted_dataset_is_made_again_for_another_run(host):
    graph = mini_training("first_of_two", "deleted", steps=2)
    folder = host.base_dir / "output" / "turbo_distill" / "datasets" / "deleted"
    for name in ("second_of_two", "third", "fourth"):
        host.run(graph, 120)
        shutil.rmtree(folder)
        graph["train"]["inputs"]["run_name"] = name
    host.run(graph, 120)
    assert (folder / "dataset.json").exists()


@pytest.mark.case("attack 10", "a finished run whose log or folder is gone still answers")
def test_a_finished_run_without_its_log_answers(host):
    graph = mini_training("logless", steps=2) | {"report": node("TurboDistillReport", run_name="logless")}
    host.run({name: graph[name] for name in graph if name != "report"}, 120)
    (run_folder(host, "logless") / "log.jsonl").unlink()
    host.forget()
    host.run(graph, 120)
    shutil.rmtree(run_folder(host, "logless"))
    host.run({"report": graph["report"]}, 120)


@pytest.mark.case("training L7", "a ModelSampling node that cannot be trained with: the message says to leave it out")
def test_an_lcm_sampling_node_is_refused_with_its_cure(host):
    graph = mini_training("lcm")
    graph["lcm"] = node("ModelSamplingDiscrete", model=["teacher", 0], sampling="lcm", zsnr=False)
    graph["train"]["inputs"]["model"] = ["lcm", 0]
    assert "Connect the model from before its ModelSampling node" in fails(host, graph)


# What a turbo MODEL brings along


@pytest.mark.case("training 4", "a turbo is trained at its own levels; what it loses by that is not measured yet")
@pytest.mark.case("training D5", "preset auto takes levels and sampler of a turbo MODEL, and says so")
@pytest.mark.case("training L1", "the node says that the MODEL is a turbo")
def test_auto_takes_a_turbos_own_levels_and_sampler(host):
    """The shipped student says 1, .75, .5, .25 and ancestral; the mini model with its own shift would give others."""
    turbo = {"turbo": node("TurboDistillLoadMiniModel", distilled=True)}
    wanted = {"auto": ([1.0, 0.75, 0.5, 0.25], "ancestral"), "none": (None, "renoise")}
    for preset, (levels, sampler) in wanted.items():
        graph = turbo | mini_training(
            f"turbo_{preset}", target_steps=4, steps=1, sampler="of the preset", preset=preset
        )
        graph["train"]["inputs"] |= {"model": ["turbo", 0], "pairs_weight": 0.0}
        (text,) = host.run(graph, 120)["outputs"]["train"]["text"]
        _, said = read_lora(lora_of(host, f"turbo_{preset}"))
        assert said["sampler"] == sampler and ("the model is a turbo" in text) == (preset == "auto")
        assert said["sigmas"] == levels if levels else said["sigmas"] != wanted["auto"][0]


def test_auto_on_a_teacher_is_none(host):
    for preset in ("auto", "none"):
        host.run(mini_training(f"plain_{preset}", target_steps=2, steps=1, preset=preset), 120)
    assert_same_files(lora_of(host, "plain_auto"), lora_of(host, "plain_none"))


def test_after_the_server_is_killed_the_run_goes_on_from_its_last_checkpoint(host, tmp_path):
    other = Host(tmp_path / "comfyui")
    settings = dict(steps=30, checkpoint_every=5, seed=3)
    try:
        other.start()
        other.queue(mini_training("killed", **settings))
        wait_for_step(other, "killed", 8)
        other.process.kill()
        other.process.wait()
        _, metadata = load_tensors(run_folder(other, "killed") / "checkpoint.safetensors")
        step = json.loads(metadata["run"])["step"]
        assert 5 <= step < 30
        other.start()
        other.run(mini_training("killed", **settings), 300)
        assert steps_of(other, "killed") == list(range(1, 31))
        assert f"run killed goes on after step {step}" in other.log()
    finally:
        other.stop()
    host.run(mini_training("unkilled", **settings), 300)
    assert_same_files(lora_of(other, "killed"), lora_of(host, "unkilled"))


# Mistakes


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/x"])
def test_a_run_name_cannot_leave_the_output_folder(host, name):
    assert f"ValueError: run name {name!r} cannot be a folder inside" in fails(host, mini_training(name))


def test_a_corrupt_checkpoint_is_named_and_nothing_is_lost(host):
    host.run(mini_training("corrupt", steps=3), 120)
    path, lora = run_folder(host, "corrupt") / "checkpoint.safetensors", lora_of(host, "corrupt").read_bytes()
    broken = path.read_bytes()[:-1000]
    path.write_bytes(broken)
    text = fails(host, mini_training("corrupt", steps=5))
    assert "checkpoint.safetensors is not a complete safetensors file" in text and "delete it" in text
    assert path.read_bytes() == broken and lora_of(host, "corrupt").read_bytes() == lora
    path.unlink()
    host.run(mini_training("corrupt", steps=5), 120)
    assert steps_of(host, "corrupt") == [1, 2, 3, 4, 5]


def test_hinge_at_batch_1_is_refused(host):
    text = fails(host, mini_training("batch1", batch_size=1))
    assert "hinge with a batch of 1" in text and "set loss to nonsaturating" in text and "gan_loss" not in text


def test_unknown_targets_are_refused(host):
    assert "no layer's name contains 'nowhere'" in fails(host, mini_training("targets", lora_targets="nowhere"))


@pytest.mark.skipif(os.geteuid() != 0, reason="FULL DISK NOT TESTED: mounting a small tmpfs needs root")
def test_a_full_disk_loses_nothing(host):
    folder = run_folder(host, "full_disk")
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"FULL DISK NOT TESTED: {mounted.stderr.decode()}")
    try:
        host.run(mini_training("full_disk", steps=3), 120)
        checkpoint = (folder / "checkpoint.safetensors").read_bytes()
        free = os.statvfs(folder)
        (folder / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - 4096))
        text = fails(host, mini_training("full_disk", steps=6, checkpoint_every=1))
        assert "the disk is full" in text and "Make room" in text
        assert (folder / "checkpoint.safetensors").read_bytes() == checkpoint
        (folder / "other").unlink()
        host.run(mini_training("full_disk", steps=6, checkpoint_every=1), 120)
        assert steps_of(host, "full_disk") == [1, 2, 3, 4, 5, 6]
        for steps in (3, 6):
            host.run(mini_training("roomy", steps=steps, checkpoint_every=1), 120)
        assert_same_files(lora_of(host, "full_disk"), lora_of(host, "roomy"))
    finally:
        subprocess.run(["umount", folder], check=True)


# The host's process


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    """What probe_run.py finds."""
    printed = run_probe("probe_run.py", tmp_path_factory.mktemp("probe"))
    return json.loads(printed.splitlines()[-1])


def test_a_run_leaves_the_host_as_it_was(probe):
    """Flags, torch's random state, loaded models; the MODEL computes what it did, the student something else."""
    assert probe["changed"] == [] and probe["output"] == 0 and probe["student"] > 1e-3 and probe["losses"] == 3


def test_without_memory_the_run_says_what_to_change_and_can_go_on(probe):
    assert probe["error"], "memory was enough"
    hints = ("gradient_checkpointing on", "batch_size from 256 to 128 and double accumulation", "lower rank from 4")
    for text in ("OutOfMemoryError: not enough memory to train", *hints):
        assert text in probe["error"]
    assert probe["kept"] and not probe["in_training"] and probe["resumed"]
    assert "set train to LoRA" in probe["advice on all weights"] and "rank" not in probe["advice on all weights"]


def test_twenty_runs_in_a_row_do_not_grow_the_server(host):
    process = psutil.Process(host.process.pid)
    for i in range(3):
        host.run(mini_training(f"warm{i}", steps=2), 120)
    before = process.memory_info().rss
    for i in range(20):
        host.run(mini_training(f"again{i}", steps=2), 120)
    grown = process.memory_info().rss / before - 1
    print(f"grown by {grown:.1%} from {before / 1e6:.0f} MB")
    assert grown < 0.05
