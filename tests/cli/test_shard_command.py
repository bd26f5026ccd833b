"""The command ``train`` with [train] shard: in two processes, and what it says where it cannot be."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill_core.cli.main import main
from distill_core.files import load_tensors, save_tensors
from distill_core.lora_files import read_lora
from distill_core.training.checkpoints import complete_sets

CONFIG = """
[model]
lora_rank = 0
gradient_checkpointing = true
[cache]
count = 12
steps = 3
guidance = 1.5
sizes = [[8, 8]]
state_sigmas = [1.0, 0.5]
batch_size = 6
[train]
steps = 3
batch_size = 4
student_lr = 3e-4
warmup_steps = 1
validation = 2
validation_every = 2
sample_every = 2
snapshot_every = 2
SHARD
[ladd]
terms = { adversarial = 1.0, pairs = 1.0 }
warmup_steps = 0
[discriminator]
width = 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a run of one process."""
    root = tmp_path_factory.mktemp("shard")
    for name, line in (("one", ""), ("shared", "shard = true")):
        (root / f"{name}.toml").write_text(CONFIG.replace("SHARD", line))
    assert main(["cache", str(root / "one.toml"), "--out", str(root / "data")]) == 0
    assert main(["train", str(root / "one.toml"), "--data", str(root / "data"), "--out", str(root / "one")]) == 0
    return root


def test_two_processes_share_a_model_and_train_the_student_of_one(folder):
    """Validation, pictures and snapshots, which the student's weights are gathered for, included."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "distill_core", "train", folder / "shared.toml", "--data", folder / "data", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [*launcher, *map(str, command), str(folder / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one, about), (two, about_too) = (read_lora(folder / run / "student.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and about_too["weights"] == "differences" and about_too["base"] == about["base"]
    assert max(value.abs().max() for value in one.values()) > 1e-4
    for name in one:  # Adam makes a step of its rate of any gradient, and so more of sums in another order
        assert (two[name] - one[name]).norm() < 1e-3 * one[name].norm(), name
    logs = [
        [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two")
    ]
    for entry, other in zip(*logs, strict=True):
        assert entry.keys() == other.keys()
        assert other.get("validation", 0) == pytest.approx(entry.get("validation", 0), rel=1e-4)
    assert sum("validation" in entry for entry in logs[1]) == 3
    for path in ("samples/step000002.jpg", "samples/step000003.jpg", "snapshots/student_step000002.safetensors"):
        assert (folder / "one" / path).exists() and (folder / "two" / path).exists(), path
    parts = [load_tensors(folder / "two" / f"checkpoint_000003_{i}of2.safetensors")[0] for i in (1, 2)]
    whole, _ = load_tensors(folder / "one" / "checkpoint.safetensors")
    assert whole.keys() == parts[0].keys() == parts[1].keys()
    for name in (name for name in whole if name.startswith(("ema.", "generator.", "optimizer.generator."))):
        joined = torch.cat([part[name] for part in parts]) if whole[name].ndim else parts[0][name]
        assert (joined - whole[name]).norm() <= 1e-3 * whole[name].norm(), name


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_a_terminated_run_stops_at_one_step_and_leaves_its_student(folder, tmp_path):
    """The signal reaches the processes at different steps; they agree, and gather the student once more."""
    (tmp_path / "c.toml").write_text(
        (folder / "shared.toml").read_text().replace("steps = 3\nbatch_size = 4", "steps = 1000\nbatch_size = 4")
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "distill_core", "train", tmp_path / "c.toml", "--data", folder / "data", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [*launcher, *map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 2):
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    step = log.read_text().count("\n")
    assert step >= 2 and max(complete_sets(tmp_path)) == (step, 2), errors[-3000:]
    assert read_lora(tmp_path / "student.safetensors")[1]["steps"] == step


def test_who_starts_it_alone_is_told(folder, tmp_path, capsys):
    """A new run, and one that two processes began, which does not go on with whole weights."""

    def said(config: str, out: Path) -> str:
        assert main(["train", str(folder / config), "--data", str(folder / "data"), "--out", str(out)]) == 2
        return capsys.readouterr().err

    assert "shares the weights out among several processes, and there is one" in said("shared.toml", tmp_path)
    state = json.loads(load_tensors(folder / "one" / "checkpoint.safetensors")[1]["run"])
    state["settings"]["shard"] = True
    for i in (1, 2):
        save_tensors(tmp_path / f"checkpoint_000003_{i}of2.safetensors", {}, {"run": json.dumps(state)})
    assert "a run with other settings ([train] shard is left out now, was True)" in said("one.toml", tmp_path)
