"""Pairs of latents with the perceptual distance of their images: what calibration learns from and is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.noise import ItemNoise, item_generator
from ..files import load_tensors, save_tensors
from .autoencoders import Autoencoder
from .distortions import IN_LATENTS, IN_PIXELS, UNSEEN
from .images import Images
from .pixel import PixelDistance

SIZE = 20  # pairs made at a time, all of one kind of distortion
KINDS = [*IN_PIXELS, *IN_LATENTS]


@dataclass(frozen=True)
class Pairs:
    """reference, distorted: model-space latents [N, C, h, w].  distance: of the images [N].  kind: index into `KINDS`
    [N].  label: class of the reference image, -1 without classes [N]."""

    reference: Tensor
    distorted: Tensor
    distance: Tensor
    kind: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.distance)


def kind_of(number: int, unseen: bool) -> tuple[str, str | None]:
    """The distortion of batch ``number``, and in every second round a milder one before it."""
    first = KINDS if unseen else [k for k in KINDS if k not in UNSEEN]
    second = [k for k in IN_PIXELS if k not in UNSEEN and k != "blend"]
    kind, turn = first[number % len(first)], number // len(first)
    return kind, second[(turn // 2 + number) % len(second)] if turn % 2 and kind in IN_PIXELS else None


@torch.no_grad()
def make_pairs(
    images: Images, autoencoder: Autoencoder, distance: PixelDistance, seed: int, number: int, unseen: bool
) -> Pairs:
    """Batch ``number``: references in a random order without repetition, strengths uniform, all from ``seed``."""
    items = range(number * SIZE, (number + 1) * SIZE)
    order = torch.randperm(images.count, generator=item_generator(seed, 1))
    picked = order[[i % images.count for i in items]]
    x, random = images.read(picked.tolist()), ItemNoise(seed + 1, items)
    strength = 0.02 + 0.98 * random.uniform()
    kind, before = kind_of(number, unseen)
    if kind in IN_LATENTS:
        reference = autoencoder.encode(x)
        distorted = IN_LATENTS[kind](reference.cpu(), strength, random).to(reference)
        pair = (autoencoder.decode(reference), autoencoder.decode(distorted))
    else:
        changed = IN_PIXELS[before](x, 0.3 * strength, random).clamp(-1, 1) if before else x
        pair = (x, IN_PIXELS[kind](changed, strength, random).clamp(-1, 1))
        reference, distorted = (autoencoder.encode(part) for part in pair)
    label = torch.full((SIZE,), -1) if images.labels is None else images.labels[picked]
    return Pairs(
        reference.cpu(), distorted.cpu(), distance(*pair).float(), torch.full((SIZE,), KINDS.index(kind)), label
    )


def cached_pairs(folder: Path, count: int, make: Callable[[int], Pairs]) -> Iterator[int | Pairs]:
    """``make(number)`` for enough batches; each is kept in ``folder``, where a stopped run goes on.

    Yields how many batches there are after each, at last the `Pairs`.
    """
    parts = []
    for number in range(-(-count // SIZE)):
        file = folder / f"{number:05d}.safetensors"
        if not file.is_file():
            save_tensors(file, vars(make(number)))
        parts.append(load_tensors(file)[0])
        yield number + 1
    yield Pairs(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
