"""Fine detail of pictures, measured without a network: spectrum, edges, and how heavy-tailed the Laplacian is.

All of it is of the grey pictures (mean of the channels) in [-1, 1]. A picture that is blurred has less energy at high
frequencies and weaker edges; one with added noise has more energy, but not where the teacher's own picture has it
(coherence), and its Laplacian is less heavy-tailed (kurtosis 3 for Gaussian noise, far above for photographs).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .intervals import Bootstrap, Figure

BANDS = 8  # equal rings from 0 to the Nyquist frequency of 0.5 cycles a pixel; the corners beyond it are in the last
FINE = slice(BANDS // 2, BANDS)  # above half of Nyquist
COLUMNS = BANDS + 3  # of `detail_columns`


def grey(images: Tensor) -> Tensor:
    """Images [B, C, H, W] -> [B, H, W] in float32."""
    return images.float().mean(1)


@lru_cache(maxsize=4)
def _rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Hann window [H, W], and which ring each bin of the real transform is in, [H (W // 2 + 1), BANDS].

    The weights make the rings' sums energies a pixel: bins that stand for two count twice, the window's loss is
    made up for.
    """
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)[None]
    radius = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width)[None].square()).sqrt()
    ring = (radius / 0.5 * BANDS).long().clamp(max=BANDS - 1).flatten()
    twice = torch.full((height, width // 2 + 1), 2.0)
    twice[:, 0] = 1.0
    if width % 2 == 0:
        twice[:, -1] = 1.0
    weight = twice.flatten() / (height * width * window.square().sum())
    return window, F.one_hot(ring, BANDS).float() * weight[:, None]


def cross_energies(a: Tensor, b: Tensor) -> Tensor:
    """The radially summed cross-spectrum, in phase, of grey pictures [B, H, W]: [B, BANDS].

    Of a picture with itself it is the power in each ring; the rings add up to the picture's variance under the window.
    """
    window, rings = (t.to(a.device) for t in _rings(*a.shape[1:]))
    first, second = (torch.fft.rfft2((x - x.mean((1, 2), keepdim=True)) * window) for x in (a, b))
    return (first * second.conj()).real.flatten(1) @ rings


def detail_columns(images: Tensor) -> Tensor:
    """What the figures of `detail_figures` are made of, for each image [B, C, H, W]: [B, COLUMNS].

    The power in each ring, the mean squared gradient (Sobel's), and the mean second and fourth powers of the Laplacian.
    """
    x = grey(images)
    smooth, edge = x.new_tensor([1.0, 2.0, 1.0]) / 4, x.new_tensor([-1.0, 0.0, 1.0]) / 2
    across = smooth[:, None] * edge[None]
    laplacian = x.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    filtered = F.conv2d(x[:, None], torch.stack([across, across.T, laplacian])[:, None])
    gradient = filtered[:, :2].square().sum(1).mean((1, 2))
    curve = filtered[:, 2]
    columns = torch.stack([gradient, curve.square().mean((1, 2)), curve.pow(4).mean((1, 2))], 1)
    return torch.cat([cross_energies(x, x), columns], 1).cpu()


def detail_figures(columns: Tensor, bootstrap: Bootstrap) -> dict[str, Figure]:
    """detail: energy above half of Nyquist.  edges: mean squared gradient.  kurtosis: of the Laplacian, over all
    pixels of all images."""
    return {
        "detail": bootstrap.of_means(columns, lambda m: m[..., FINE].sum(-1)),
        "edges": bootstrap.of_means(columns, lambda m: m[..., BANDS]),
        "kurtosis": bootstrap.of_means(columns, lambda m: m[..., BANDS + 2] / m[..., BANDS + 1].square()),
    }
