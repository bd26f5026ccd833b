"""How sure a figure is: the bootstrap over the evaluated items (Efron 1979), with the same resamples for everybody.

A figure carries its value on every resample. Since the resamples depend on nothing but the number of items, item i of
one model and item i of another (same noise, same prompt) are drawn together: subtracting two figures gives the paired
interval of their difference, even if the two were computed in different processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

REPEATS = 400
LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """A number about a set of items, and the same number for every resample of the set [repeats].

    The difference of two figures is a figure. Raises ValueError when the two have not the same resamples.
    """

    value: float
    replicates: Tensor

    def __sub__(self, other: Figure) -> Figure:
        if len(self.replicates) != len(other.replicates):
            raise ValueError(
                f"figures of {len(self.replicates)} and {len(other.replicates)} resamples cannot be compared; "
                "evaluate both with one version"
            )
        return Figure(self.value - other.value, self.replicates - other.replicates)

    @property
    def bias(self) -> float:
        """How much larger the figure of so many items is than that of endlessly many, as the bootstrap sees it: the
        mean of the resamples less the value. 0 for a mean; positive for a Fréchet distance (`frechet`)."""
        return self.replicates.double().mean().item() - self.value if len(self.replicates) else 0.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """(low, high) of what this figure would be for other items of the same number, with probability ``level``.

        The basic bootstrap with its bias taken out (Davison and Hinkley 1997, section 5.2): value - quantiles of the
        resamples' deviations from their mean. Less `bias`, it is the interval for endlessly many items. Without
        resamples (nan, nan).
        """
        if not len(self.replicates):
            return float("nan"), float("nan")
        deviations = self.replicates.double() - self.replicates.double().mean()
        tails = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=torch.float64)
        low, high = (self.value - deviations.quantile(tails)).tolist()
        return low, high

    def plain(self) -> dict[str, float]:
        """For JSON: value, low and high."""
        low, high = self.interval()
        return {"value": round(self.value, 4), "low": round(low, 4), "high": round(high, 4)}

    def __format__(self, form: str) -> str:
        """``f"{figure:.2f}"`` is "1.81 [1.70, 1.92]"."""
        return in_words(self.plain(), form)


def in_words(plain: dict[str, float], form: str) -> str:
    """A figure's `Figure.plain` as "1.81 [1.70, 1.92]"."""
    value, low, high = (format(plain[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


class Bootstrap:
    """Resamples of ``count`` items, drawn with replacement.

    strata: item i is of class i mod strata and is replaced by items of its class, as the evaluation draws equally many
    of each; 1 for items that are all alike.  counts [repeats, count]: how often each item is in each resample.
    """

    def __init__(self, count: int, strata: int = 1, repeats: int = REPEATS) -> None:
        self.count = count
        generator = np.random.default_rng([count, strata])
        stratum = np.arange(count) % strata
        sizes = (count - stratum + strata - 1) // strata  # of each item's class
        rows = []
        for _ in range(repeats):
            picks = stratum + strata * (generator.random(count) * sizes).astype(np.int64)
            rows.append(torch.from_numpy(np.bincount(picks, minlength=count)).float())
        self.counts = torch.stack(rows) if rows else torch.zeros(0, count)

    def of_means(self, columns: Tensor, statistic: Callable[[Tensor], Tensor]) -> Figure:
        """The figure ``statistic(means)`` of the items' columns [count, K]; statistic: [..., K] -> [...], float64."""
        columns = columns.double()
        means = self.counts.double() @ columns / self.count
        return Figure(statistic(columns.mean(0)).item(), statistic(means).float())

    def of_mean(self, values: Tensor) -> Figure:
        """The mean of one value an item [count]."""
        return self.of_means(values[:, None], lambda means: means[..., 0])

    def each(self, statistic: Callable[[Tensor], float]) -> Figure:
        """The figure ``statistic(weights [count])``, a resample at a time; the weights of the set itself are 1."""
        value = statistic(torch.ones(self.count))
        return Figure(value, torch.tensor([statistic(weights) for weights in self.counts]))
