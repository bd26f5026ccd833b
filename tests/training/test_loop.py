import json
import math
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
import toy
from toy import LADD_TERMS, LEVELS, TERMS, cache_toy, toy_method, toy_run

from distill_core.data.dataset import LatentDataset
from distill_core.files import load_tensors, save_tensors
from distill_core.methods.ladd import LADDConfig
from distill_core.training.figures import Figures
from distill_core.training.loop import Run, TrainConfig, accumulate, copy_into, finish_gradient, train, training_step

ACCUMULATED = {"accumulation": 2, "discriminator_updates": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Everything that a run carries from step to step."""
    state = {f"ema.{name}": value for name, value in run.ema.items()}
    for player in run.players:
        state |= {f"{player.name}.{name}": value.detach() for name, value in player.parameters.items()}
        for index, moments in run.optimizers[player.name].state_dict()["state"].items():
            state |= {f"{player.name}.{index}.{key}": value for key, value in moments.items()}
    return {name: value.clone() for name, value in state.items()}


def assert_equal_states(a: Run, b: Run) -> None:
    first, second = state_of(a), state_of(b)
    assert a.step == b.step and first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def finish(run: Run) -> Run:
    for _ in train(run):
        pass
    return run


# Resume


@pytest.mark.case("training 9", "a resumed run with accumulation ends bit-equal")
@pytest.mark.parametrize("changes", [{}, ACCUMULATED], ids=["plain", "accumulated"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_and_resumed_run_ends_bit_equal(dataset, tmp_path, terms, changes, stop):
    whole = finish(toy_run(dataset, ladd=TERMS[terms], **changes))
    for event in train(toy_run(dataset, tmp_path, TERMS[terms], **changes)):
        if event.step == stop:
            break
    resumed = toy_run(dataset, tmp_path, TERMS[terms], **changes)
    steps = [event.step for event in train(resumed)]
    assert steps == list(range(stop + 1, 7))
    assert_equal_states(resumed, whole)


def test_training_changes_what_is_compared(dataset):
    """The comparison above would also hold for a loop that does nothing."""
    run = toy_run(dataset)
    before = state_of(run)
    after = state_of(finish(run))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(before) and {name.split(".")[0] for name in moved} == {
        "ema",
        "generator",
        "discriminator",
    }


def test_an_exception_of_the_listener_keeps_the_last_step(dataset, tmp_path):
    with pytest.raises(RuntimeError, match="listener"):
        for event in train(toy_run(dataset, tmp_path)):
            if event.step == 3:
                raise RuntimeError("listener")
    run = toy_run(dataset, tmp_path)
    assert run.resume() and run.step == 3


def test_a_step_is_told_before_it_is_in_the_checkpoint(dataset, tmp_path):
    """Else a process that is killed between the two would never log the step."""
    path = tmp_path / "checkpoint.safetensors"
    for event in train(toy_run(dataset, tmp_path, checkpoint_every=2)):
        saved = json.loads(load_tensors(path)[1]["run"])["step"] if path.exists() else 0
        assert saved == (event.step - 1) // 2 * 2
    assert json.loads(load_tensors(path)[1]["run"])["step"] == event.steps


def test_an_interrupt_inside_the_updates_keeps_the_checkpoint_before(dataset, tmp_path, monkeypatch):
    """Between the two optimisers' steps the weights belong to no step; saving them would break exact resume."""
    run = toy_run(dataset, tmp_path, checkpoint_every=2)

    def interrupted(*args, **kwargs):
        if run.step == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = run.optimizers["discriminator"].step
    monkeypatch.setattr(run.optimizers["discriminator"], "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(run)
    resumed = toy_run(dataset, tmp_path, checkpoint_every=2)
    assert [event.step for event in train(resumed)] == [3, 4, 5, 6]
    assert_equal_states(resumed, finish(toy_run(dataset)))


def start_training(out, data, steps: int, **changes) -> subprocess.Popen:
    command = [sys.executable, toy.__file__, str(out), str(data), str(steps), *(f"{k}={v}" for k, v in changes.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_from_its_last_checkpoint(dataset, tmp_path):
    """Killed while it writes a checkpoint at every step: it resumes, and still ends as an uninterrupted run."""
    process = start_training(tmp_path, dataset.folder, 1000, checkpoint_every=1)
    for line in process.stdout:
        if int(line) == 12:
            break
    process.kill()
    process.communicate()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = toy_run(dataset, tmp_path, TERMS["hinge"], steps=1000)
        assert run.resume() and run.step >= 11  # a step is told before its checkpoint is written
        stop = run.step + 3
        whole = toy_run(dataset, None, TERMS["hinge"], steps=1000)
        for resumed_or_whole in (run, whole):
            for event in train(resumed_or_whole):
                if event.step == stop:
                    break
        assert_equal_states(run, whole)
    finally:
        torch.set_num_threads(threads)


# Refusals


def checkpoint_of(dataset, folder, **changes) -> bytes:
    for _ in train(toy_run(dataset, folder, steps=2, **changes)):
        pass
    return (folder / "checkpoint.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed"),
        ({"student_lr": 1e-3}, "student_lr"),
        ({"ladd": LADDConfig(renoise_mean=0.0)}, "ladd.renoise_mean"),
        ({"description": {"base": "another"}}, "base"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_and_kept(dataset, tmp_path, changes, named):
    before = checkpoint_of(dataset, tmp_path)
    with pytest.raises(ValueError, match=rf"other settings \({named} is .* now"):
        finish(toy_run(dataset, tmp_path, **changes))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_finished_run_can_be_made_longer(dataset, tmp_path):
    checkpoint_of(dataset, tmp_path)
    assert [event.step for event in train(toy_run(dataset, tmp_path, steps=4))] == [3, 4]


def test_a_checkpoint_of_another_model_is_refused_and_kept(dataset, tmp_path):
    before = checkpoint_of(dataset, tmp_path)
    run = toy_run(dataset, tmp_path)
    other = Run(toy_method(dataset, rank=3), dataset, run.config, tmp_path, run.description)
    with pytest.raises(ValueError, match="of another model"):
        finish(other)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_checkpoint_is_refused(dataset, tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    content = checkpoint_of(dataset, tmp_path)
    if damage == "truncated":
        path.write_bytes(content[:-10])
    else:
        path.write_bytes((dataset.folder / "shard-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="checkpoint.safetensors is not a"):
        finish(toy_run(dataset, tmp_path))


@pytest.mark.case("attack 12", "a checkpoint whose step, moments or weights are not what they say is refused by name")
@pytest.mark.parametrize("damage", [None, "3", 2.5, math.nan, 1e12, "a missing moment", "a moment's shape", "nan"])
def test_a_checkpoint_of_nonsense_is_refused(dataset, tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint_of(dataset, tmp_path)
    tensors, metadata = load_tensors(path)
    state = json.loads(metadata["run"])
    moment = next(name for name in tensors if name.endswith("exp_avg"))
    if damage == "a missing moment":
        del tensors[moment]
    elif damage == "a moment's shape":
        tensors[moment] = tensors[moment].new_zeros(1, 1, 7)
    elif damage == "nan":
        tensors[moment] = tensors[moment].fill_(math.nan)
    else:
        state["step"] = damage
    save_tensors(path, tensors, {**metadata, "run": json.dumps(state)})
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged"):
        finish(toy_run(dataset, tmp_path))


def test_hinge_with_one_item_is_refused_before_any_step(dataset, tmp_path):
    run = toy_run(dataset, tmp_path, batch_size=1, accumulation=4)
    before = state_of(run)
    with pytest.raises(ValueError, match="hinge with a batch of 1"):
        finish(run)
    assert all(torch.equal(before[name], value) for name, value in state_of(run).items())
    assert not list(tmp_path.iterdir())
    finish(toy_run(dataset, batch_size=1, ladd=LADDConfig(gan_loss="nonsaturating"), steps=1))


def test_a_batch_that_cannot_be_shared_out_is_refused(dataset):
    class Three:
        process_index, num_processes = 0, 3

    with pytest.raises(ValueError, match="does not divide among 3"):
        toy_run(dataset, accelerator=Three())


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"accumulation": 0}, {"ema_decay": 1.0}, {"precision": "float8"}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        TrainConfig(**bad)


# Values that are not finite


def poison(parameters) -> None:
    with torch.no_grad():
        next(iter(parameters.values())).flatten()[0] = float("nan")


@pytest.mark.parametrize("player", [0, 1], ids=["student", "heads"])
def test_nan_weights_stop_the_run_and_the_good_checkpoint_stays(dataset, tmp_path, player):
    run = toy_run(dataset, tmp_path, checkpoint_every=2)
    with pytest.raises(FloatingPointError):
        for event in train(run):
            if event.step == 3:
                good = (tmp_path / "checkpoint.safetensors").read_bytes()
                poison(run.players[player].parameters)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(dataset, tmp_path):
    """The loss can be finite and its gradient not; all weights stay those of the last complete step."""
    run = toy_run(dataset, tmp_path)
    with pytest.raises(FloatingPointError, match="discriminator gradient is not finite at step 3"):
        for event in train(run):
            if event.step == 2:
                good = state_of(run)
                weight = next(iter(run.players[1].parameters.values()))
                weight.register_hook(lambda grad: grad * float("inf"))
    assert all(torch.equal(good[name], value) for name, value in state_of(run).items())
    resumed = toy_run(dataset, tmp_path)
    assert resumed.resume() and resumed.step == 2


def test_nan_loss_is_reported_with_its_step(dataset, tmp_path, monkeypatch):
    run = toy_run(dataset, tmp_path)
    start = run.method.start

    def nan_in_the_second_step(batch, random, step):
        return start(replace(batch, latents=batch.latents * (float("nan") if step == 1 else 1)), random, step)

    monkeypatch.setattr(run.method, "start", nan_in_the_second_step)
    with pytest.raises(FloatingPointError, match="generator loss is not finite at step 2"):
        finish(run)
    resumed = toy_run(dataset, tmp_path)
    assert resumed.resume() and resumed.step == 1


# One step


@pytest.mark.parametrize("terms", LADD_TERMS)
def test_each_phase_gives_gradients_to_its_own_parameters_only(dataset, terms):
    run = toy_run(dataset, ladd=TERMS[terms])
    batch, random = run.batch(0)
    step = run.method.start(batch, random, 0)
    student, heads = (list(player.parameters.values()) for player in run.players)
    accumulate(run, run.players[0], step, Figures())
    assert all(p.grad is not None and p.grad.any() for p in student) and all(p.grad is None for p in heads)
    run.optimizers["generator"].zero_grad()
    accumulate(run, run.players[1], step, Figures())
    assert all(p.grad is None for p in student) and all(p.grad is not None for p in heads)
    still = {name for name, p in run.players[1].parameters.items() if not p.grad.any()}
    assert still <= {"heads.0.logit.bias", "heads.1.logit.bias"}  # real and fake pull an output's bias apart equally
    network = run.method.student.backend.network
    assert all(p.grad is None for p in network.parameters())


LOGS = (
    "adversarial",
    "distillation",
    "pairs",
    "consistency",
    "diversity",
    "spread",
    "size",
    "discriminator",
    "accuracy",
    "logit_gap",
    "logit_spread",
    "r1",
)


def test_a_step_leaves_no_gradient_and_the_backbone_as_it_was(dataset):
    run = toy_run(dataset, **ACCUMULATED)
    network = run.method.student.backend.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    finish(run)
    assert all(p.grad is None for player in run.players for p in player.parameters.values())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_discriminator_steps_as_often_as_asked(dataset):
    run = toy_run(dataset, steps=3, discriminator_updates=3)
    finish(run)
    counts = {name: next(iter(o.state.values()))["step"].item() for name, o in run.optimizers.items()}
    assert counts == {"generator": 3, "discriminator": 9}


def test_every_update_of_the_discriminator_sees_fresh_noise(dataset):
    run = toy_run(dataset, steps=1, discriminator_updates=3)
    seen, loss = [], run.method.discriminator_loss

    def watch(step):
        seen.append((step.renoise_time.clone(), step.real_noised.clone(), step.fake.detach().clone()))
        return loss(step)

    run.players[1] = replace(run.players[1], loss=watch)
    finish(run)
    times, noised, fakes = zip(*seen, strict=True)
    assert len(seen) == 3 and all(torch.equal(fake, fakes[0]) for fake in fakes)
    assert all((a != b).all() for a, b in ((times[0], times[1]), (times[1], times[2]), (noised[0], noised[1])))


@pytest.mark.parametrize("ramp", [10.0, 2.0, 1.0])
def test_the_average_follows_its_formula(dataset, ramp):
    run = toy_run(dataset, steps=5, ema_decay=0.3, ema_ramp=ramp)
    expected = {name: value.detach().clone() for name, value in run.student_parameters.items()}
    for event in train(run):
        decay = min(0.3, event.step / (event.step - 1 + ramp))
        expected = {n: decay * expected[n] + (1 - decay) * v.detach() for n, v in run.student_parameters.items()}
        torch.testing.assert_close(run.ema, expected)
    trained = {name: value.detach().clone() for name, value in run.student_parameters.items()}
    with run.ema_weights():
        assert all(torch.equal(run.ema[name], value) for name, value in run.student_parameters.items())
    assert all(torch.equal(trained[name], value) for name, value in run.student_parameters.items())
    assert any(not torch.equal(trained[name], value) for name, value in run.ema.items())


def test_the_rate_rises_stays_and_falls():
    config = TrainConfig(steps=100, warmup_steps=10, decay_from=0.7)
    rates = [config.lr_scale(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5)
    assert rates[9:71] == pytest.approx([1.0] * 62)
    assert rates[85] == pytest.approx(0.5) and 0 < rates[99] <= 1 / 29
    assert TrainConfig(steps=100, warmup_steps=0, decay_from=1.0).lr_scale(99) == 1.0


def test_the_rate_reaches_both_optimisers(dataset):
    run = toy_run(dataset, student_lr=2e-3, discriminator_lr=8e-3, warmup_steps=4)
    for event in train(run):
        if event.step == 2:
            break
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in run.optimizers.items()}
    assert rates == {"generator": pytest.approx(1e-3), "discriminator": pytest.approx(4e-3)}
    assert event.logs["rate"] == 0.5


class InOrder:
    """Batch n is rows n * size ... of a dataset, so that the items do not depend on the batch size."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset, self.uncond = dataset, dataset.uncond

    def batch(self, number, size, seed, part=(0, 1)):
        (places,) = self.dataset.buckets.values()
        return self.dataset.read([places[(number * size + i) % len(places)] for i in range(size)])


@pytest.mark.parametrize("terms", LADD_TERMS)
def test_accumulation_equals_one_large_batch(dataset, terms):
    gradients = []
    for n in (1, 2, 4):
        run = toy_run(InOrder(dataset), ladd=TERMS[terms], batch_size=8 // n, accumulation=n)
        for micro in range(n):
            batch, random = run.batch(micro)
            step = run.method.start(batch, random, 0)
            for player in run.players:
                accumulate(run, player, step, Figures())
        gradients.append({f"{p.name}.{name}": w.grad for p in run.players for name, w in p.parameters.items()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3


def test_gradients_are_clipped_together(dataset):
    run = toy_run(dataset, gradient_clip=1e-3)
    run.student_parameters["up.0"].register_hook(lambda grad: 100 * grad)
    batch, random = run.batch(0)
    figures = Figures()
    accumulate(run, run.players[0], run.method.start(batch, random, 0), figures)
    finish_gradient(run, run.players[0], figures)
    assert figures.read() == []
    norm = torch.stack([p.grad.norm() for p in run.student_parameters.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3) and figures.logs["generator_grad_norm"][0] > 1e-2


def test_bfloat16_trains_float32_weights(dataset):
    run = toy_run(dataset, precision="bfloat16", ladd=TERMS["hinge"])
    used = []
    run.method.teacher.backend.network.blocks[0].inlet.register_forward_hook(lambda m, a, out: used.append(out.dtype))
    finish(run)
    assert set(used) == {torch.bfloat16} and {p.dtype for p in run.student_parameters.values()} == {torch.float32}
    assert not run.student_parameters["up.0"].isnan().any()


def test_pairs_alone_need_no_discriminator_and_learn(dataset):
    config = LADDConfig({"pairs": 1.0}, LEVELS, (1.0, 0, 0, 0), warmup_steps=0)
    run = toy_run(dataset, ladd=config, steps=60, batch_size=16)
    losses = [event.logs["pairs"] for event in train(run)]
    assert [player.name for player in run.players] == ["generator"] and losses[-1] < 0.8 * losses[0]


def test_copying_checks_names_and_shapes():
    with pytest.raises(ValueError, match="another model: b"):
        copy_into({"a": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="another model: a"):
        copy_into({"a": torch.zeros(2)}, {"a": torch.ones(1)})


DAMAGES = {
    "a moment is gone": lambda tensors, name: tensors.pop(name),
    "a moment has another name": lambda tensors, name: tensors.update({f"x{name}": tensors.pop(name)}),
    "a moment is twice as large": lambda tensors, name: tensors.update({name: torch.stack([tensors[name]] * 2)}),
    "a moment is a number": lambda tensors, name: tensors.update({name: torch.tensor(1.0)}),
    "a moment has whole numbers": lambda tensors, name: tensors.update({name: tensors[name].int()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy", "schedulefree"])
def test_an_optimizers_tensors_are_those_that_were_written(dataset, tmp_path, optimizer, damage):
    """Whatever an optimizer keeps: torch and the packages would fail in the middle of a step."""
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    for _ in train(toy_run(dataset, tmp_path, steps=2, optimizer=optimizer, student_lr=rate)):
        pass
    tensors, metadata = load_tensors(tmp_path / "checkpoint.safetensors")
    name = max(name for name in tensors if name.startswith("optimizer.generator") and tensors[name].ndim)
    DAMAGES[damage](tensors, name)
    save_tensors(tmp_path / "checkpoint.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged: the optimizer's"):
        toy_run(dataset, tmp_path, optimizer=optimizer, student_lr=rate).resume()


def test_the_checkpoint_holds_tensors_and_json_only(dataset, tmp_path):
    checkpoint_of(dataset, tmp_path)
    tensors, metadata = load_tensors(tmp_path / "checkpoint.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"ema", "generator", "discriminator", "optimizer", "buffer"}
    assert set(metadata) == {"run"} and [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_logs_say_what_happened(dataset):
    logs = training_step(toy_run(dataset, ladd=TERMS["mixed"], **ACCUMULATED))
    assert logs.keys() | {"distillation"} == {*LOGS, "generator_grad_norm", "discriminator_grad_norm", "rate"}


# Two processes

TWO = """
import sys, torch
torch.set_num_threads(1)
from accelerate import Accelerator
from safetensors.torch import save_file
from toy import TERMS, toy_run
from distill_core.data.dataset import LatentDataset
from distill_core.training.figures import Figures
from distill_core.training.loop import train
processes = Accelerator(cpu=True)
assert processes.num_processes == 2
data, out = sys.argv[1:]
for terms in TERMS:
    folder = f"{out}/{terms}"
    rates = dict(student_lr=1e-3, discriminator_lr=1e-3)
    run = toy_run(LatentDataset(data), folder, TERMS[terms], accelerator=processes, discriminator_updates=2, **rates)
    assert len([event for event in train(run)]) == 6
    weights = run.method.discriminator.state_dict() | run.student_parameters
    save_file(weights, f"{folder}-{processes.process_index}.safetensors")
processes.wait_for_everyone()
"""


def test_two_processes_train_what_one_does(dataset, tmp_path):
    """Real processes over gloo: both ranks hold the same weights, and those of one process with the same batch.

    Diffusion2GAN mixes items within a process and penalises one item in each, so there only the ranks agree.
    """
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    tests = Path(toy.__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "two.py", dataset.folder, tmp_path], env=environment, check=True, timeout=600)
    for terms in TERMS:
        rates = dict(student_lr=1e-3, discriminator_lr=1e-3)
        one = finish(toy_run(dataset, ladd=TERMS[terms], discriminator_updates=2, **rates))
        ranks = [load_tensors(tmp_path / f"{terms}-{rank}.safetensors")[0] for rank in (0, 1)]
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
        for name, alone in one.student_parameters.items() if "diffusion2gan" not in terms else ():
            torch.testing.assert_close(
                ranks[0][name], alone.detach(), atol=1e-5 if terms in LADD_TERMS else 1e-4, rtol=0
            )
        assert (tmp_path / terms / "checkpoint.safetensors").exists()


@pytest.mark.case("methods B1", "a student of which half the weights get no gradient ends the run with a sentence")
def test_weights_without_gradient_are_an_error(dataset):
    run = toy_run(dataset)
    for index, p in enumerate(run.student_parameters.values()):
        p.grad = torch.zeros_like(p) if index % 2 else None
    with pytest.raises(ValueError, match="6 of the generator's 12 trained tensors get no gradient .down"):
        finish_gradient(run, run.players[0], Figures())


@pytest.mark.case("methods B3", "a micro-batch is gone when the next one starts, unless a later update needs it")
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("updates", [1, 3])
def test_a_micro_batch_leaves_nothing_that_is_not_needed(dataset, terms, updates):
    run = toy_run(dataset, ladd=TERMS[terms], accumulation=4, discriminator_updates=updates)
    seen, start, counts = [], run.method.start, []

    def watched(batch, random, step):
        alive = [ref() for ref in seen if ref() is not None]
        counts.append(len(alive))
        for old in alive:
            cached = {n for n in vars(old) if isinstance(getattr(type(old), n, None), cached_property)}
            assert cached <= set(old.kept) and not any(
                t.requires_grad for n in cached for t in (vars(old)[n] if isinstance(vars(old)[n], list) else [])
            )
            assert not old.fake.requires_grad
        made = start(batch, random, step)
        seen.append(weakref.ref(made))
        return made

    run.method.start = watched
    training_step(run)
    assert counts == ([0, 0, 0, 0] if updates == 1 else [0, 1, 2, 3])
