"""Adversarial losses, gradient penalties and regression distances.

An adversarial loss is a pair of functions of logits [B, N] with larger meaning more real; both take (fake, real), and
means run over all logits. ``GAN_LOSSES`` names them: hinge (StyleGAN-T, ADD eq. 2-3), non-saturating (Goodfellow et
al. 2014), relativistic with paired items (Jolicoeur-Martineau 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.process import DiscreteProcess, NoiseProcess


def hinge_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    return -fake.mean()


def hinge_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def nonsaturating_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    return F.softplus(-fake).mean()


def nonsaturating_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def relativistic_generator(fake: Tensor, real: Tensor) -> Tensor:
    return F.softplus(real - fake).mean()


def relativistic_discriminator(fake: Tensor, real: Tensor) -> Tensor:
    return F.softplus(fake - real).mean()


GAN_LOSSES: dict[str, tuple[Callable, Callable]] = {
    "hinge": (hinge_generator, hinge_discriminator),
    "nonsaturating": (nonsaturating_generator, nonsaturating_discriminator),
    "relativistic": (relativistic_generator, relativistic_discriminator),
}


def r1_on_head_inputs(logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Squared norm of the gradient of each item's mean logit by the feature maps: sum over maps, mean over items.

    ADD's R1 (section 3.2): on real features only, so double backward runs through the heads alone. ``maps`` must
    require gradients before the heads ran.
    """
    grads = torch.autograd.grad(logits.mean(1).sum(), list(maps), create_graph=True)
    return torch.stack([grad.square().flatten(1).sum(1) for grad in grads]).sum(0).mean()


def approximate_r1(logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """||D(x) - D(x + sigma n)||^2 (APT, arXiv 2501.08316, eq. 9), D the mean logit, mean over items.

    ``perturbed_logits`` must come from the very tensor that gave ``logits``, plus sigma times unit noise, at the same
    t. The value estimates sigma^2 ||grad D||^2.
    """
    return (logits.mean(1) - perturbed_logits.mean(1)).square().mean()


SEEN_IN_HALF = 0.1  # noise that changes features by clearly more than the rounding of bfloat16 does


def seen_noise(sigma: float, computed: Sequence[Tensor]) -> float:
    """The noise of an approximate R1: at least `SEEN_IN_HALF` where tensors like these come from half precision."""
    half = any(m.dtype in (torch.bfloat16, torch.float16) for m in computed)
    return max(sigma, SEEN_IN_HALF) if half or torch.is_autocast_enabled(computed[0].device.type) else sigma


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Per item (sqrt(||d||^2 + c^2) - c) / sqrt(D), c = 0.00054 sqrt(D) (Song & Dhariwal 2023, section 3.3).

    Computed as ||d||^2 / (sqrt(||d||^2 + c^2) + c), which is the same and exactly 0 where d is.
    """
    dim = prediction[0].numel()
    c = 0.00054 * dim**0.5
    square = (prediction - target).float().flatten(1).square().sum(1)
    return square / ((square + c**2).sqrt() + c) / dim**0.5


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Per-item mean squared error [B]."""
    return (prediction - target).float().flatten(1).square().mean(1)


def signal_and_noise(process, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) [B] of the network's input alpha x0 + sigma noise at a level of any process."""
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    alpha = process.calculate_input(sigma, process.noise_scaling(sigma, zero, one))
    return alpha, process.calculate_input(sigma, process.noise_scaling(sigma, one, zero))


MIN_SNR = 5.0  # gamma of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556)


def denoising_weight(process: NoiseProcess, sigma: Tensor) -> Tensor:
    """Weight [B] of ||x0 - prediction||^2 that makes it the loss a model was trained by.

    Flow models: 1 / sigma^2, the error of the velocity. Others: min(SNR, 5) with SNR = 1 / sigma^2, which is the error
    of eps weighted by min(SNR, 5) / SNR, or that of v weighted by min(SNR, 5) / (SNR + 1).
    """
    snr = sigma.float() ** -2
    return snr.clamp(max=MIN_SNR) if isinstance(process, DiscreteProcess) else snr


def prediction_weight(process: NoiseProcess, sigma: Tensor) -> Tensor:
    """Weight [B] of ||x0 - prediction||^2 that makes it the squared error of what the network itself predicts.

    1 / sigma^2 for the velocity of a flow model and for eps, (1 + sigma^2) / sigma^2 for v.
    """
    snr = sigma.float() ** -2
    return snr + 1 if getattr(process, "prediction", "") == "v" else snr


def sds_weight(sigma: Tensor) -> Tensor:
    """w(t) = sigma_t^2 (DreamFusion, Poole et al. 2022, section 3); ADD leaves it open."""
    return sigma.square()


def exponential(alpha: Tensor, sigma: Tensor) -> Tensor:
    """c(t) = alpha_t (ADD section 3.3): noisier levels count less."""
    return alpha


def score_distillation(alpha: Tensor, sigma: Tensor) -> Tensor:
    """c(t) = alpha_t w(t) / (2 sigma_t) (ADD appendix A): the gradient of c ||x - target||^2 by x is then
    w(t) (eps_hat - eps), that of score distillation sampling."""
    return alpha * sds_weight(sigma) / (2 * sigma)


DISTILLATION_WEIGHTS = {"exponential": exponential, "sds": score_distillation, "nfsd": score_distillation}
REDUCTIONS = ("mean", "sum")


REGRESSIONS = {"huber": pseudo_huber, "mse": squared_error}
