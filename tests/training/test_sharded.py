"""All weights trained with model and student shared out among processes: two of them, on a CPU, over gloo."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_core.files import load_tensors, save_tensors
from distill_core.training.checkpoints import complete_sets, forget_older, part_name, path_to_read, path_to_write
from distill_core.training.loop_config import TrainConfig
from distill_core.training.sharded import check_sharded

SCRIPT = Path(__file__).with_name("sharded_runs.py")


@contextmanager
def started(*arguments):
    """The script in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, SCRIPT, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Three steps of five runs, each with whole weights and with shared ones."""
    folder = tmp_path_factory.mktemp("sharded")
    with started("compare", folder) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return folder


def loaded(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    tensors, told = load_tensors(folder / f"{name}.safetensors")
    return tensors, {key: json.loads(text) for key, text in told.items()}


# That of sums in another order. Adam makes more of it: a step moves a weight by its rate, however small the gradient.
TOLERANCE = {"sd3": 1e-5, "flux": 1e-5, "unet": 2e-4, "critic": 1e-5, "dmd2": 1e-5}


@pytest.mark.parametrize("name", TOLERANCE)
def test_shared_weights_become_what_whole_ones_do(compared, name):
    """Weights, average, heads and figures, of LADD with all its terms, Diffusion2GAN and DMD2; rates 1e-3, three
    steps."""
    (whole, told), (shared, told_too) = (loaded(compared, f"{name}-{kind}-0") for kind in ("whole", "shared"))
    assert whole.keys() == shared.keys() and len(whole) > 200
    for key in whole:
        torch.testing.assert_close(
            shared[key], whole[key], atol=TOLERANCE[name], rtol=0, msg=lambda text, key=key: f"{key} {text}"
        )
    for one, other in zip(told["logs"], told_too["logs"], strict=True):
        assert one.keys() == other.keys() and {"generator_grad_norm", "discriminator_grad_norm"} < one.keys()
        for key in one:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    second, _ = loaded(compared, f"{name}-shared-1")
    assert all(torch.equal(shared[key], second[key]) for key in shared)  # both see the same weights


@pytest.mark.parametrize("name", ["sd3", "flux", "unet"])
def test_each_process_keeps_half_of_the_weights(compared, name):
    whole, parts = (loaded(compared, f"{name}-{kind}-{rank}")[1] for kind, rank in (("whole", 0), ("shared", 0))), []
    whole = next(iter(whole))["bytes"]
    parts = [loaded(compared, f"{name}-shared-{rank}")[1]["bytes"] for rank in (0, 1)]
    for part in parts:
        assert part["student"] < 0.51 * whole["student"]
        assert part["teacher"] < 0.57 * whole["teacher"]  # what is not in its blocks, much in networks this small
    assert sum(part["student"] for part in parts) >= whole["student"]


@pytest.mark.parametrize("name", ["sd3", "flux", "unet"])
def test_the_first_process_writes_the_whole_student(compared, name):
    """The differences of all weights, under the names and with the values of a run that has them whole."""
    whole, shared = (loaded(compared, f"{name}-{kind}-0-student")[0] for kind in ("whole", "shared"))
    assert whole.keys() == shared.keys() and len(whole) > 50
    moved = max(value.abs().max() for value in whole.values())
    assert moved > 2e-3
    assert max((shared[key] - whole[key]).abs().max() for key in whole) < TOLERANCE[name]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path):
    """One of two processes is killed while both write their parts after every step."""
    with started("endless", tmp_path) as process:
        told = (re.search(r"rank 1 pid (\d+) step (\d+)\n", line) for line in process.stdout)
        victim = next(int(match[1]) for match in told if match and int(match[2]) >= 4)
        os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode
    with started("resumed", tmp_path) as process:
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    first = {int(step) for step in re.findall(r"went on from (\d+)", out)}
    assert out.count("went on") == 2 and len(first) == 1 and first.pop() >= 3


# Files


def run_in(folder: Path, rank: int = 0, world: int = 2, step: int = 0):
    return SimpleNamespace(folder=folder, parts=SimpleNamespace(rank=rank, world=world), step=step, is_main=rank == 0)


def put(folder: Path, *names: str) -> None:
    for name in names:
        save_tensors(folder / name, {"x": torch.zeros(1)}, {})


def test_a_run_goes_on_from_the_last_step_that_all_have_written(tmp_path):
    put(tmp_path, *(part_name(10, i, 2) for i in (1, 2)), part_name(20, 1, 2))
    assert complete_sets(tmp_path) == {(10, 2)}
    assert path_to_read(run_in(tmp_path, 1)).name == "checkpoint_000010_2of2.safetensors"
    put(tmp_path, part_name(20, 2, 2))
    assert path_to_read(run_in(tmp_path, 1)).name == "checkpoint_000020_2of2.safetensors"


def test_the_step_before_stays_and_later_ones_of_a_former_life_go(tmp_path):
    put(tmp_path, *(part_name(step, i, 2) for step in (5, 10, 12, 20) for i in (1, 2)))
    forget_older(path_to_write(run_in(tmp_path, 0, step=12)))
    left = sorted(path.name for path in tmp_path.glob("*_1of2.*"))
    assert left == [part_name(10, 1, 2), part_name(12, 1, 2)]
    assert len(list(tmp_path.glob("*_2of2.*"))) == 4  # each process removes its own


def test_another_number_of_processes_is_refused(tmp_path):
    put(tmp_path, *(part_name(10, i, 2) for i in (1, 2)))
    with pytest.raises(ValueError, match="shared out among 2 processes, and these are 4: start it with 2"):
        path_to_read(run_in(tmp_path, 3, 4))


@pytest.mark.parametrize(
    "changes, lora, processes, message",
    [
        ({}, False, 1, "among several processes, and there is one: .* accelerate launch --num_processes N"),
        ({}, True, 2, "for training all weights: .* Set lora_rank = 0"),
        ({"offload": "ram"}, False, 2, "offload and shard cannot be used together"),
        ({"offload_activations": True}, False, 2, "offload_activations and shard cannot"),
        ({"optimizer": "adafactor"}, False, 2, "'adafactor' looks at many weights at once"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, lora, processes, message):
    with pytest.raises(ValueError, match=message):
        check_sharded(TrainConfig(shard=True, **changes), lora, processes)
    check_sharded(TrainConfig(shard=True), False, 2)
