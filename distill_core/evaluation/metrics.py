"""All figures of a set of samples, with their intervals; each figure's own module says what it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..models import mini
from ..models.shipped import images_of
from .detail import detail_columns, detail_figures
from .frechet import frechet_figure
from .intervals import REPEATS, Bootstrap, Figure
from .neighbours import MOST, neighbour_figures
from .own import distance_columns, image_columns, own_figures
from .spaces import Space, mini_space

Figures = dict[str, Figure]


def diversity(features: Tensor, labels: Tensor, bootstrap: Bootstrap) -> Figure:
    """The mean over classes and features [N, D] of the standard deviation within a class, labels [N]."""
    features, counts, parts = features.double(), bootstrap.counts.double(), []
    ones = torch.ones(1, len(features), dtype=torch.float64)
    for label in labels.unique():
        rows = labels == label
        x = features[rows] - features[rows].mean(0)
        weights = torch.cat([ones, counts])[:, rows]
        size = weights.sum(1, keepdim=True).clamp(min=1)
        variance = weights @ x.square() / size - (weights @ x / size).square()
        parts.append((variance * size / (size - 1).clamp(min=1)).clamp(min=0).sqrt().mean(1))
    values = torch.stack(parts).mean(0)
    return Figure(values[0].item(), values[1:].float())


def combinations(groups: Mapping[str, Tensor]) -> Tensor | None:
    """What is asked for, as one number an item [N], from the classes [N] of all word groups; None without any."""
    if not groups:
        return None
    return torch.stack(list(groups.values()), 1).unique(dim=0, return_inverse=True)[1]


def accuracies(space: Space, features: Tensor, groups: Mapping[str, Tensor], bootstrap: Bootstrap) -> Figures:
    """The share of items [N, D] whose class is right, for each word group that the space knows.

    Where there are several groups, "alignment" is the mean of their accuracies.
    """
    right = {group: head(features).argmax(1) == groups[group] for group, head in space.heads.items() if group in groups}
    names = {group: f"accuracy_{group}" if group else "accuracy" for group in right}
    figures = {f"{names[group]}{space.suffix}": bootstrap.of_mean(of) for group, of in right.items()}
    if len(right) > 1:
        figures[f"alignment{space.suffix}"] = bootstrap.of_mean(torch.stack(list(right.values())).double().mean(0))
    return figures


class Evaluator:
    """Scores sets of latents in the given spaces and, if ``decode`` is given, the detail of their images.

    decode: latents [B, C, H, W] -> images [B, 3, h, w] in [-1, 1].  size: latents in one batch.
    repeats: resamples for the intervals; 0 for none.  examples: latents of a reference, e.g. the teacher's from other
    noises, for density and coverage in the first space, which is one on latents.
    """

    def __init__(
        self,
        spaces: Sequence[Space],
        decode: Callable[[Tensor], Tensor] | None,
        size: int = 100,
        repeats: int = REPEATS,
        examples: Tensor | None = None,
    ) -> None:
        self.spaces, self._decode, self.size, self.repeats = list(spaces), decode, size, repeats
        if examples is not None:
            with torch.no_grad():
                features = torch.cat([spaces[0].features(part, part) for part in examples.split(250)])
            self.spaces[0] = replace(spaces[0], examples=features)

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, labels: Tensor | Mapping[str, Tensor] | None = None, own: Tensor | None = None
    ) -> Figures:
        """The figures of latents [N, C, H, W], by name.

        In each space fd; with ``labels`` [N], what was asked for in turn, `accuracies` and `diversity`; with examples
        density and coverage. Of the images `detail_figures`. With ``own``, the teacher's own latents from the first
        noises [M <= N], `own_figures` of those items.
        labels: of several word groups by their names; diversity is then within a combination of them.
        """
        groups = {"": labels} if isinstance(labels, Tensor) else dict(labels or {})
        asked = combinations(groups)
        strata = 1 if asked is None else len(asked.unique())
        columns = self._collect(latents, own)
        bootstrap = Bootstrap(len(latents), strata, self.repeats)
        figures: Figures = {}
        for space in self.spaces:
            features, name = columns[space.suffix], space.suffix
            figures[f"fd{name}"] = frechet_figure(features, space.reference, bootstrap)
            if asked is not None and space.heads.keys() & groups.keys():
                figures |= accuracies(space, features, groups, bootstrap)
                figures[f"diversity{name}"] = diversity(features, asked, bootstrap)
            if space.examples is not None:
                some = Bootstrap(min(len(latents), MOST), strata, self.repeats)
                near = neighbour_figures(features[:MOST], space.examples[:MOST], some)
                figures |= {f"{key}{name}": figure for key, figure in near.items()}
        if "detail" in columns:
            figures |= detail_figures(columns["detail"], bootstrap)
        if own is not None:
            paired = Bootstrap(len(own), strata, self.repeats)
            figures |= own_figures(columns["own latents"], columns["own images"], paired)
        return figures

    def _collect(self, latents: Tensor, own: Tensor | None) -> dict[str, Tensor]:
        """What the figures are made of, a row an item; images are dropped batch by batch."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for start in range(0, len(latents), self.size):
            x = latents[start : start + self.size]
            images = self.decode(x) if self._decode else x
            for space in self.spaces:
                parts[space.suffix].append(space.features(x, images).cpu())
            if self._decode:
                parts["detail"].append(detail_columns(images))
            other = own[start : start + self.size] if own is not None else x[:0]
            if len(other):
                parts["own latents"].append(distance_columns(x[: len(other)], other))
                parts["own images"].append(image_columns(images[: len(other)], self.decode(other)))
        return {name: torch.cat(rows) for name, rows in parts.items()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [N, 3, h, w] in [-1, 1], on the CPU."""
        if self._decode is None:
            raise ValueError("this evaluator was made without a decoder")
        return torch.cat([self._decode(part).float().cpu() for part in latents.split(self.size)])


class MiniEvaluator(Evaluator):
    """The mini model's figures, in the classifiers on its latents and on its images.

    pixels: False leaves out whatever needs decoding, which is the slow part. examples: latents of a reference, e.g. the
    teacher's from other noises, for density and coverage on latents.
    """

    def __init__(self, pixels: bool = True, repeats: int = REPEATS, examples: Tensor | None = None) -> None:
        decode = partial(images_of, mini.load_autoencoder().decoder)
        spaces = [mini_space("latent"), *([mini_space("pixel")] if pixels else [])]
        super().__init__(spaces, decode if pixels else None, repeats=repeats, examples=examples)


def mini_scores(latents: Tensor, labels: Tensor, pixels: bool = True) -> dict[str, float]:
    """The mini model's figures without intervals, where many are asked for quickly; labels in any order."""
    return {name: round(f.value, 4) for name, f in MiniEvaluator(pixels, repeats=0)(latents, labels).items()}
