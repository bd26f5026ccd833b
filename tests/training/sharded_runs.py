"""Runs of tiny networks in several processes, for test_sharded.py: ``torchrun ... sharded_runs.py WHAT OUT``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from networks import LATENT, build_cond, build_network

from distill_core.data.dataset import Batch
from distill_core.files import save_tensors
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.sharding import Sharding, part, whole
from distill_core.training.loop import Run, train
from distill_core.training.loop_config import TrainConfig
from distill_core.training.plan import Shapes
from distill_core.training.run import RunConfig, StudentConfig, assemble

MIXED = {"adversarial": 1.0, "consistency": 0.5, "denoising": 0.5}
METHODS = {
    "mixed": LADDConfig(MIXED, gan_loss="relativistic", r1=0.1, own_share=0.5, warmup_steps=0),
    "plain": LADDConfig(warmup_steps=0),
    "critic": Diffusion2GANConfig({"adversarial": 1.0}, critic="lora", critic_rank=4, r1=1.0, r1_by="difference"),
    "dmd2": DMD2Config(fake_score_rank=4, fake_score_updates=2),
}


@dataclass(frozen=True)
class Drawn(Shapes):
    """Batches that depend on their number alone, of which a process gets its rows."""

    def batch(self, number: int, size: int, seed: int, part: tuple[int, int] = (0, 1)) -> Batch:
        latents = torch.randn(size, *self.latent, generator=torch.Generator().manual_seed(number))
        latents = latents.chunk(part[1])[part[0]]
        return Batch(latents, self.cond[[0] * len(latents)])


def new_run(processes, family: str, method: str, folder: Path | None = None, checkpointing=False, **changes) -> Run:
    backend = DiffusersBackend(build_network(family), gradient_checkpointing=checkpointing)
    settings = dict(steps=3, batch_size=4, student_lr=1e-3, warmup_steps=1, precision="float32", gradient_clip=0.5)
    train_config = TrainConfig(**{**settings, **changes})
    if train_config.shard:
        backend.share_out(Sharding(processes.device))
    config = RunConfig(
        METHODS[method], train_config, StudentConfig(0), {"base": "", "dataset": ""}, DiscriminatorConfig(8, 1)
    )
    return assemble(config, Components(backend), Drawn(LATENT, build_cond(1)), folder, accelerator=processes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    """All that a run has trained, whole."""
    network = run.method.student.backend.network
    with run.ema_weights():
        found = {f"ema.{name}": whole(value).clone() for name, value in network.state_dict().items()}
    found |= {f"student.{name}": whole(value).clone() for name, value in network.state_dict().items()}
    for player in run.players[1:]:
        found |= {f"{player.name}.{name}": p.detach().clone() for name, p in player.parameters.items()}
    return found


def mine(run: Run) -> dict[str, torch.Tensor]:
    """All that this process has of a run, moments, too."""
    found = {f"ema.{name}": value for name, value in run.ema.items()}
    for player in run.players:
        for name, value in player.parameters.items():
            found |= {f"{player.name}.{name}": value.detach()}
            states = run.optimizers[player.name].state[value]
            found |= {f"{player.name}.{name}.{key}": state for key, state in states.items()}
    return {name: value.clone() for name, value in found.items()}


def bytes_of(run: Run) -> dict[str, int]:
    """What this process keeps of both networks."""
    networks = {"student": run.method.student.backend, "teacher": run.method.teacher.backend}
    return {
        name: sum(part(p).untyped_storage().nbytes() for p in backend.network.parameters())
        for name, backend in networks.items()
    }


def finished(run: Run, steps: int | None = None) -> list[dict[str, float]]:
    logs = []
    for event in train(run):
        logs.append(event.logs)
        if event.step == steps:
            break
    return logs


def compare(processes, out: Path, cases) -> None:
    """Each case with whole weights and with shared ones: weights, logs, bytes."""
    for name, family, method, changes in cases:
        for shard in (False, True):
            run = new_run(processes, family, method, shard=shard, **changes)
            logs, told = finished(run), bytes_of(run)
            tensors = weights(run)
            with run.ema_weights():
                student = run.method.student.backend.export(None)
            label = f"{name}-{'shared' if shard else 'whole'}-{processes.process_index}"
            save_tensors(out / f"{label}.safetensors", tensors, {"logs": json.dumps(logs), "bytes": json.dumps(told)})
            if processes.is_main_process:
                save_tensors(out / f"{label}-student.safetensors", student, {})
            else:
                assert not shard or not student


LONG = dict(shard=True, checkpointing=True, accumulation=2, discriminator_updates=2, steps=1000, checkpoint_every=1)


def endless(processes, out: Path) -> None:
    """A run that is to be killed; it says after each step how far it is, and who it is."""
    for event in train(new_run(processes, "sd3", "mixed", out, **LONG)):
        sys.stdout.write(f"rank {processes.process_index} pid {os.getpid()} step {event.step}\n")  # in one piece
        sys.stdout.flush()


def resumed(processes, out: Path) -> None:
    """The killed run, gone on with, beside one that was not: each process compares what it has."""
    again = new_run(processes, "sd3", "mixed", out, **LONG)
    assert again.resume()
    first = again.step
    finished(again, first + 2)
    uninterrupted = new_run(processes, "sd3", "mixed", **LONG)
    finished(uninterrupted, first + 2)
    one, other = mine(uninterrupted), mine(again)
    assert one.keys() == other.keys() and len(one) > 100
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    sys.stdout.write(f"rank {processes.process_index} went on from {first}\n")
    sys.stdout.flush()


CASES = [
    ("sd3", "sd3", "mixed", dict(checkpointing=True, accumulation=2, discriminator_updates=2)),
    ("flux", "flux", "plain", dict(optimizer="adamw", caption_dropout=0.3)),
    ("unet", "unet", "mixed", dict(checkpointing=True, ema_in_ram=True)),
    ("critic", "sd3", "critic", dict(checkpointing=True)),
    ("dmd2", "sd3", "dmd2", dict(checkpointing=True)),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out = sys.argv[1], Path(sys.argv[2])
    processes = Accelerator(cpu=True)
    if what == "compare":
        compare(processes, out, CASES)
    else:
        {"endless": endless, "resumed": resumed}[what](processes, out)
    processes.wait_for_everyone()
