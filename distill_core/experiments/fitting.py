"""What the makers of the shipped models share: fitting a network, running it in batches, writing its files."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from ..diffusion.process import expand_like
from ..files import load_tensors, save_tensors
from ..models import shipped

EVERY = 250  # steps between checkpoints


class Making:
    """A command that makes a shipped model again: its folders, its seed, and the log in ``training.json``.

    options: the command's, of `makers_parser`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.seed, self.checkpoint = options.seed, options.work / "checkpoint.safetensors"
        for folder in (options.out, options.work):
            folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.seed)
        self.path = options.out / "training.json"
        self.log = json.loads(self.path.read_text()) if self.path.exists() else {"seed": self.seed}

    def stage(self, steps: int) -> Stage:
        return Stage(steps, self.seed, self.checkpoint)

    def record(self, name: str, entry: dict) -> None:
        self.log[name] = entry
        self.path.write_text(json.dumps(self.log, indent=1) + "\n")


def makers_parser(description: str | None, out: Path, work: str, kept: str) -> argparse.ArgumentParser:
    """out: where the shipped files are.  work, kept: where the command keeps what it goes on from, and what that is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="where the model files go")
    parser.add_argument("--work", type=Path, default=Path(work), help=f"{kept}, for a restart")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def noised(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, C, H, W] on a straight path to noise, at logit-normal(0, 1) times: x_t, the times [B], and the
    velocity that is to be learnt."""
    sigma = torch.sigmoid(torch.randn(len(x0), generator=generator))
    noise = torch.randn(x0.shape, generator=generator)
    s = expand_like(sigma, x0)
    return s * noise + (1 - s) * x0, sigma, noise - x0


@dataclass(frozen=True)
class Stage:
    """How long a part is fitted and from which seed.

    checkpoint: a file that is written every `EVERY` steps, from which a stopped command goes on; removed at the end.
    """

    steps: int
    seed: int
    checkpoint: Path | None = None


def fit(
    parameters: list[nn.Parameter],
    loss_fn: Callable[[torch.Generator], Tensor],
    lr: float,
    name: str,
    stage: Stage,
    average: Sequence[Tensor] = (),
) -> dict:
    """AdamW with a short warm-up and a linear fall to zero over the last 60 %; returns the log of the run.

    average: copies of the parameters that become their moving average of decay 0.999.
    """
    steps, checkpoint = stage.steps, stage.checkpoint
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(stage.seed)
    losses, first, started = [], 0, time.time()
    if checkpoint and checkpoint.exists():
        first = restore(load_tensors(checkpoint)[0], parameters, average, optimizer, generator)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((first + i + 1) / 100, 1.0, 0.02 + (1 - (first + i) / steps) / 0.6)
    )
    bar = trange(first, steps, desc=name, mininterval=5, initial=first, total=steps)
    for step in bar:
        loss = loss_fn(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average:
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average), [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.item())
        if step % 50 == 49:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.4f}")
        if checkpoint and step % EVERY == EVERY - 1:
            save_tensors(checkpoint, stored(parameters, average, optimizer, generator, step + 1))
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    tail = losses[-200:]
    return {"steps": steps, "lr": lr, "seconds": round(time.time() - started), "final_loss": sum(tail) / len(tail)}


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def stored(
    parameters: Sequence[nn.Parameter],
    average: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
) -> dict[str, Tensor]:
    """All that `fit` goes on from, as tensors."""
    state = {"step": torch.tensor(step), "generator": generator.get_state()}
    state |= {f"average.{i}": value for i, value in enumerate(average)}
    for i, parameter in enumerate(parameters):
        state[f"parameter.{i}"] = parameter.detach()
        state |= {f"{key}.{i}": optimizer.state[parameter][key] for key in MOMENTS}
    return {name: value.contiguous().clone() for name, value in state.items()}


@torch.no_grad()
def restore(
    state: dict[str, Tensor],
    parameters: Sequence[nn.Parameter],
    average: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Undo `stored`; returns the number of steps that are done."""
    generator.set_state(state["generator"])
    for i, value in enumerate(average):
        value.copy_(state[f"average.{i}"])
    for i, parameter in enumerate(parameters):
        parameter.copy_(state[f"parameter.{i}"])
        optimizer.state[parameter] = {key: state[f"{key}.{i}"].clone() for key in MOMENTS}
    return int(state["step"])


@torch.inference_mode()
def in_batches(fn: Callable[[Tensor], Tensor], x: Tensor, name: str, size: int = 200) -> Tensor:
    return torch.cat([fn(x[i : i + size]) for i in trange(0, len(x), size, desc=name, mininterval=5)])


def save_autoencoder(net: nn.Module, path: Path) -> None:
    """Write the TAESD layout, zero-padded to width 64, in float16; the latents need no scale in the SD3 family."""
    wide = {name: torch.zeros_like(value) for name, value in shipped.new_autoencoder(64).state_dict().items()}
    for name, value in net.state_dict().items():
        wide[name][tuple(slice(n) for n in value.shape)] = value
    state = {shipped.taesd_key(name): value.half().contiguous() for name, value in wide.items()}
    # ComfyUI's SD3 latent format is (z - 0.0609) * 1.5305; these two undo it, so the transformer sees our latents.
    state |= {"vae_scale": torch.tensor(1.5305), "vae_shift": torch.tensor(0.0609)}
    save_file(state, path)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in state.items()}
