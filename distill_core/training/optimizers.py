"""Optimizers and learning-rate schedules by name, and what a checkpoint keeps of an optimizer.

The packages of those that torch does not have are optional (extra ``optimizers``) and imported when one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import package

ADAMW = "adamw"


def _adamw(groups: list[dict], lr: float, betas, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _adamw8bit(groups: list[dict], lr: float, betas, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    kind = package("bitsandbytes", 'optimizer "adamw8bit"').optim.AdamW8bit
    return kind(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _adafactor(groups: list[dict], lr: float, betas, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018; without moments of the first kind, its rate relative to the size of a weight."""
    return torch.optim.Adafactor(groups, lr, weight_decay=weight_decay)


def _prodigy(groups: list[dict], lr: float, betas, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """Mishchenko and Defazio 2023; one estimate of the rate for all weights, so all have the same."""
    kind = package("prodigyopt", 'optimizer "prodigy"').Prodigy
    if lr <= 0 or len({group["lr_scale"] for group in groups}) > 1:
        raise ValueError(
            "prodigy finds one learning rate for all weights: give it a rate above 0 (1 is usual), and choose another "
            "optimizer for a discriminator that trains its parts at different rates"
        )
    corrections = {"use_bias_correction": True, "safeguard_warmup": True}
    return kind(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, **corrections)


def _schedule_free(groups: list[dict], lr: float, betas, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """Defazio et al. 2024. The weights that are trained are y; those to sample with are x (`averaged`)."""
    kind = package("schedulefree", 'optimizer "schedulefree"').AdamWScheduleFree
    betas = (betas[0] or 0.9, betas[1])  # its first is the share of the average in y, and 0 would lose the average
    optimizer = kind(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
    optimizer.train()
    return optimizer


Factory = Callable[[list[dict], float, tuple[float, float], float, float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Factory] = {
    ADAMW: _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "schedulefree": _schedule_free,
}


def new_optimizer(name: str, groups: list[dict], lr: float, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of `OPTIMIZERS` on parameter groups, each with its ``lr_scale``.

    settings: betas, eps, weight_decay. Raises ValueError where its package is missing or it cannot train the groups.
    """
    return OPTIMIZERS[name](groups, lr, settings["betas"], settings["eps"], settings["weight_decay"])


# Schedules: a learning rate's factor from ``left``, which falls from above 1 through 1, where the decay begins, to 0.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * min(1.0, left))) / 2,
    "constant": lambda left: 1.0,
}


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int, decay_from: float) -> float:
    """The factor on the learning rates at a step (0-based): a linear warm-up, then the schedule."""
    left = (steps - step) / max(1.0, (1 - decay_from) * steps)
    return min(1.0, (step + 1) / max(1, warmup_steps), SCHEDULES[schedule](left))


@torch.no_grad()
def averaged(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """The value of a parameter that the optimizer wants to be sampled with: schedule-free's average x, else its own.

    y = (1 - beta) z + beta x, so x = y + (1 - 1 / beta) (z - y); the parameter itself stays y.
    """
    group = optimizer.param_groups[0]
    if "train_mode" not in group or "z" not in optimizer.state[parameter]:
        return parameter.detach()
    z = optimizer.state[parameter]["z"]
    return parameter.detach().to(z).lerp(z, 1 - 1 / group["betas"][0])


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that an optimizer knows: tensors by "PARAMETER.KEY", and what is not a tensor as JSON (numbers of single
    parameters, and of the groups: Prodigy's estimate d, schedule-free's sums)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.clone()  # some share a tensor among parameters, a file does not
            else:
                numbers.setdefault(name, {})[key] = value
    groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups, "shapes": _shapes(tensors)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list]:
    """Kind and shape of each tensor, as JSON."""
    return {path: [str(value.dtype), *value.shape] for path, value in sorted(tensors.items())}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_state` gave (``rest`` is empty in checkpoints of version 0.2, which had AdamW alone).

    Raises ValueError for what it did not give: a tensor that is missing, of another shape, or of no parameter.
    """
    given = _shapes(tensors)
    shapes = rest.get("shapes", given)
    wrong = sorted(path for path in given.keys() | shapes.keys() if given.get(path) != shapes.get(path))
    wrong += sorted(path for path in given if path.rpartition(".")[0] not in parameters)
    if wrong:
        raise ValueError(f"the optimizer's {wrong[0]} is missing, has another shape or type, or belongs to nothing")
    optimizer.state.clear()
    for path, value in tensors.items():
        name, _, key = path.rpartition(".")
        parameter = parameters[name]
        # Step counts stay on the CPU, as torch keeps them.
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    for name, numbers in rest.get("numbers", {}).items():
        optimizer.state[parameters[name]].update(numbers)
    for group, saved in zip(optimizer.param_groups, rest.get("groups", ()), strict=False):
        # JSON has no tuples, and the groups' own settings (betas) are the run's.
        group.update({key: value for key, value in saved.items() if not isinstance(value, list)})


@contextmanager
def in_float32(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> Iterator[None]:
    """Parameters in bfloat16 as float32, with their gradients, for the time of an optimizer's step.

    They come back rounded up or down at random, with odds by which the mean is exact (Gupta et al. 2015, section 3):
    updates below half a step of the format, which nearest rounding would lose, add up. generator: on their device.
    """
    halves = [p for p in parameters if p.dtype == torch.bfloat16]
    for p in halves:
        gradient = p.grad
        p.grad = None
        p.data = p.data.float()
        p.grad = None if gradient is None else gradient.float()
    yield
    for p in halves:
        gradient, p.grad = p.grad, None
        p.data = rounded_at_random(p.data, generator)
        p.grad = None if gradient is None else gradient.bfloat16()


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16: up with the probability that the part below its last bit says. Finite values only."""
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


HIGH_RATE, LOW_PRODIGY = 1e-2, 0.1


def rate_questions(rates: Mapping[str, tuple[str, float]]) -> list[str]:
    """What is odd about learning rates, a sentence each. rates: setting -> (optimizer, rate)."""
    questions = []
    for name, (optimizer, rate) in rates.items():
        if rate == 0:
            questions.append(f"{name} is 0: nothing is learnt with it")
        elif optimizer == "prodigy" and rate < LOW_PRODIGY:
            questions.append(f"{name} is {rate:g}: prodigy finds its own rate and takes this as a factor, usually 1")
        elif optimizer not in ("prodigy", "adafactor") and rate > HIGH_RATE:
            questions.append(
                f"{name} is {rate:g}: above {HIGH_RATE:g} almost every run breaks; 1 is a rate for prodigy only"
            )
    return questions
