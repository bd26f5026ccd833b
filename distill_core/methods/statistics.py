"""What is logged of a step so that a run can be judged (`training.monitor`).

Callers give each item once: a batch that was filled up with repeats says which rows those are (`data.Batch.distinct`),
and an item that is no output of the student, such as a mismatched target, is left out. All
values are scalars on the device of the items.
"""

from __future__ import annotations

from torch import Tensor


def discriminator_health(fake: Tensor, real: Tensor) -> dict[str, Tensor]:
    """By the mean logit of each item: accuracy, the gap between real and fake, and the spread among items of a kind.

    fake, real: logits [A, N] and [B, N]. Nothing where a kind has no item; no spread where it has one.
    """
    fake, real = fake.detach().mean(1), real.detach().mean(1)
    if not len(fake) or not len(real):
        return {}
    correct = ((fake < 0).float().mean() + (real > 0).float().mean()) / 2
    health = {"accuracy": correct, "logit_gap": real.mean() - fake.mean()}
    if len(fake) > 1 and len(real) > 1:
        health["logit_spread"] = ((fake.var() + real.var()) / 2).sqrt()
    return health


def diversity(fake: Tensor, real: Tensor) -> dict[str, Tensor]:
    """How large items [B, C, H, W] are and how much they differ from each other.

    ``size``: root mean square of the student's.  ``spread``: their standard deviation among items.  ``diversity``: that
    as a part of the real ones'. A single item has a size only.
    """
    fake = fake.detach().float()
    size = {"size": fake.square().mean().sqrt()}
    if len(fake) < 2:
        return size
    spread = fake.std(0).mean()
    return size | {"diversity": spread / real.std(0).mean().clamp(min=1e-6), "spread": spread}
