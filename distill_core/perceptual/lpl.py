"""Latent Perceptual Loss: distance of the autoencoder decoder's features (Berrada et al. 2024, arXiv 2411.04873).

Needs no weights but the autoencoder, and no random transforms; same interface as E-LatentLPIPS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.noise import ItemNoise
from .autoencoders import Autoencoder
from .trunk import check_latent

EPSILON = 1e-5


class LatentPerceptualLoss:
    """``metric(prediction, target, random=None) -> [B]``, at least 0, gradient to the prediction only.

        sum_l w_l mean_chw ((phi_l(a) - phi_l(b)) / std_l)^2

    phi_l: the decoder's stages.  std_l: per channel over positions, of the target's features for both ("shared"
    normalisation; the means cancel).  w_l halves with every doubling of the resolution.
    Differs from the paper: outliers of the features are not masked.  Not symmetric, since the target sets the scale.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder

    def __call__(self, prediction: Tensor, target: Tensor, random: ItemNoise | None = None) -> Tensor:
        channels = self.autoencoder.space.channels
        check_latent(prediction, channels, "the prediction")
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
        with torch.no_grad():
            aims = self.autoencoder.features(target)
        total = torch.zeros(len(prediction), device=prediction.device)
        for found, aim in zip(self.autoencoder.features(prediction), aims, strict=True):
            found, aim = found.float(), aim.float()
            variance = aim.var((2, 3), keepdim=True, correction=0) + EPSILON
            weight = aims[0].shape[-1] / aim.shape[-1]
            total = total + weight * ((found - aim).square() / variance).mean((1, 2, 3))
        return total
