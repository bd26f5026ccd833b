"""What tuning has gained: how near samples of the own prompts come to own pictures that were held out of it.

Seen through the turbo as it was before: its own block outputs are features that no outside network has to give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..data.dataset import LatentDataset
from ..diffusion.noise import ItemNoise
from ..diffusion.samplers import Model, sample
from ..models.denoiser import Cond, Denoiser
from .intervals import REPEATS, Bootstrap, Figure
from .retention import Asked
from .samples import EVALUATION

GRID = 4  # the places of a block output that are told apart, along a side: a style may be an arrangement
MOST = 64  # own pictures that are looked at
LEVEL = 0.25  # flow time at which the turbo looks at a latent: little noise, all of the picture is left
STREAM = "evaluation: features"
FLOOR = 0.02  # of a distance that a gain is a share of: samples like the pictures already have nothing to gain


@dataclass(frozen=True)
class OwnPictures:
    """Own pictures that were not trained on: latents [N, C, H, W] of one shape, and a row of conditioning for each."""

    latents: Tensor
    conds: list[Cond]

    @classmethod
    def of(cls, dataset: LatentDataset) -> OwnPictures:
        """Up to `MOST` of the dataset's first size, evenly chosen. Raises ValueError for fewer than two."""
        shape = tuple(dataset.shapes[0])
        items = [item for bucket, of in dataset.buckets.items() if tuple(bucket[:3]) == shape for item in of]
        if len(items) < 2:
            raise ValueError(f"{dataset.folder} has {len(items)} picture of its first size; at least two are needed")
        count = min(MOST, len(items))
        read = [dataset.read([items[i * len(items) // count]]) for i in range(count)]
        return cls(torch.cat([batch.latents for batch in read]), [batch.cond for batch in read])

    def samples(self, model: Model, asked: Asked, device: torch.device | str) -> Tensor:
        """One answer of the model to each picture's prompt, at the turbo's levels (``asked``): like `latents`."""
        sampler = {"sampler": asked.sampler, **asked.options, "seed": asked.seed, "purpose": EVALUATION}
        answers = [
            sample(model, model.process, asked.sigmas, cond.to(device), self.latents.shape[1:], items=[i], **sampler)
            for i, cond in enumerate(self.conds)
        ]
        return torch.cat(answers).float().cpu()

    @torch.no_grad()
    def features(self, turbo: Denoiser, latents: Tensor, device: torch.device | str) -> Tensor:
        """Block outputs of the turbo for latents like its own, lightly noised, pooled to a grid: [N, D] on the CPU."""
        taps, rows = turbo.backend.default_taps(3), []
        sigma = turbo.process.sigma_at_flow_time(torch.tensor([LEVEL])).to(device)
        for i, cond in enumerate(self.conds):
            x = latents[i : i + 1].float().to(device)
            noised = turbo.process.noise_scaling(sigma, ItemNoise(0, [i], STREAM).normal_like(x), x)
            maps = turbo.features(noised, sigma, cond.to(device), taps)
            rows.append(torch.cat([adaptive_avg_pool2d(m.float(), GRID).flatten(1) for m in maps], 1).cpu())
        return torch.cat(rows)


def concept_gain(own: Tensor, before: Tensor, after: Tensor, repeats: int = REPEATS) -> dict[str, Figure]:
    """Features [M, D] of held-out own pictures, and [N, D] of samples of their prompts by the turbo before and after.

    concept_before, concept_after: `energy_distance` of the samples to the pictures, in units of the mean distance
    between two pictures: 0 for samples like the pictures.
    gain: the share of the distance before that is gone, 1 for all of it, 0 for none; for a turbo that went away from
    them, minus the share of the distance after that is new. Distances below `FLOOR` count as that much.
    Raises ValueError for fewer than two of each, or features that are not finite.
    """
    for name, x in {"own pictures": own, "samples before": before, "samples after": after}.items():
        if len(x) < 2:
            raise ValueError(f"{len(x)} {name}: at least two are needed to tell how they are spread")
        if not x.isfinite().all():
            raise ValueError(f"the {name} have features that are not finite")
    spread = own.double().std(0).clamp(min=1e-6)
    own, before, after = (x.double() / spread for x in (own, before, after))
    bootstrap = Bootstrap(len(before), 1, repeats)
    weights = torch.cat([torch.ones(1, len(before)), bootstrap.counts]).double()
    distances = {"before": energy_distance(before, own, weights), "after": energy_distance(after, own, weights)}
    larger = torch.maximum(distances["before"], distances["after"]).clamp(min=FLOOR)
    gain = (distances["before"] - distances["after"]) / larger
    figures = {**{f"concept_{when}": value for when, value in distances.items()}, "gain": gain}
    return {name: Figure(values[0].item(), values[1:].float()) for name, values in figures.items()}


def energy_distance(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets [N, D], [M, D] (Szekely and Rizzo 2013), over E|y - y'|: [R].

    Without bias: no item is compared with itself. weights [R, N]: how often each x counts.
    """
    across = weights @ torch.cdist(x, y).mean(1) / weights.sum(1)
    pairs = 1 - torch.eye(len(x), dtype=x.dtype)
    within = ((weights @ torch.cdist(x, x)) * weights).sum(1) / ((weights @ pairs) * weights).sum(1)
    reference = torch.cdist(y, y).sum() / (len(y) * (len(y) - 1))
    return (2 * across - within - reference) / reference
