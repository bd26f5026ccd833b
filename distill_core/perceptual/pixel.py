"""Perceptual distances between images: what calibration regresses onto."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.vision import image_network
from .metric import total, unit

PixelDistance = Callable[[Tensor, Tensor], Tensor]  # two batches of images [B, 3, H, W] in [-1, 1] -> [B]


class ImageNetDistance:
    """LPIPS's form with unit weights on an ImageNet network that comes inside a Python package (EfficientNet-lite0).

    sum over six depths of mean_hw sum_c (unit(phi(a)) - unit(phi(b)))^2 (Zhang et al. 2018, eq. 1, w = 1). The depths
    are the stem and the last block of each resolution, and the last block of all but one.
    """

    def __init__(self) -> None:
        self.network = image_network()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network.to(device)

    def taps(self, images: Tensor) -> list[Tensor]:
        net = self.network
        x = net._swish(net._bn0(net._conv_stem(images)))
        taps = [x]
        for block in net._blocks:
            before, x = x, block(x)
            if x.shape[-1] != before.shape[-1]:
                taps.append(before)
        return [*taps, x]

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        pairs = zip(self.taps(a.to(device)), self.taps(b.to(device)), strict=True)
        return total((unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in pairs).cpu()


class LPIPSDistance:
    """The package lpips, where the user has it; the package itself fetches the backbone's weights if it lacks them."""

    def __init__(self, backbone: str) -> None:
        try:
            import lpips
        except ImportError:
            raise ValueError("this distance needs the package lpips: pip install lpips") from None
        self.network = lpips.LPIPS(net=backbone, verbose=False).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a.cpu(), b.cpu()).flatten()


PIXEL_DISTANCES: dict[str, Callable[[], PixelDistance]] = {
    "efficientnet": ImageNetDistance,
    "lpips-vgg": lambda: LPIPSDistance("vgg"),
    "lpips-alex": lambda: LPIPSDistance("alex"),
}
