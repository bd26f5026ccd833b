"""Noise processes: how a latent is noised at a level sigma and how a network's output becomes ``denoised``.

The only place that knows prediction types. A process has the interface of ComfyUI's ``model_sampling`` objects, so
the host's own object can stand in for ours: ``noise_scaling``, ``calculate_input``, ``calculate_denoised``,
``timestep``, ``sigma_min``, ``sigma_max``. Two additions translate between sigma and *flow time*, the common scale
0 (clean) .. 1 (noise) on which training densities are stated (papers: LADD section 3, SD3 section 3.1).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..devices import Table

PREDICTIONS = ("eps", "v")
# diffusers and ComfyUI both replace an exact zero of the cumulative alpha by a tiny value; so do we (2 ** -24).
ZERO_SNR_ALPHA = 2.0**-24


def expand_like(sigma: Tensor, x: Tensor) -> Tensor:
    """[B] (or []) -> [B, 1, 1, ...] with the number of dimensions of ``x``."""
    return sigma.reshape(sigma.shape[:1] + (1,) * (x.ndim - 1)) if sigma.ndim else sigma


def euler_step(x: Tensor, denoised: Tensor, sigma: Tensor, lower: Tensor | float) -> Tensor:
    """From x [B, C, H, W] at levels sigma [B] towards ``denoised``, to lower levels: [B], or one for all."""
    sigma = expand_like(sigma, x)
    below = expand_like(lower, x) if isinstance(lower, Tensor) else lower
    return x + (x - denoised) / sigma * (below - sigma)


class NoiseProcess(Protocol):
    """What samplers, training and presets ask of a noise process; sigma is [B] everywhere, latents [B, C, H, W].

    ComfyUI's ``model_sampling`` has all of it but the two flow times, which only training needs.
    """

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False
    ) -> Tensor: ...  # the noised latent at sigma

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor: ...  # what the network is given for x

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor: ...

    def timestep(self, sigma: Tensor) -> Tensor: ...  # the network's time input

    def flow_time(self, sigma: Tensor) -> Tensor: ...  # in [0, 1]

    def sigma_at_flow_time(self, time: Tensor) -> Tensor: ...  # its inverse


class TimestepProcess(Protocol):
    """A process over a table of timesteps: `DiscreteProcess`, or ComfyUI's discrete ``model_sampling``."""

    def timestep(self, sigma: Tensor) -> Tensor: ...

    def sigma(self, timestep: Tensor) -> Tensor: ...  # at a timestep, which may be fractional


class FlowProcess:
    """Rectified flow: x = (1 - sigma) x0 + sigma noise, network output v = noise - x0 (SD3, FLUX, Qwen, Wan).

    sigma is in [0, 1] and is the flow time itself. ``timestep_multiplier`` scales the network's time input
    (1000 for SD3 and diffusers' SD3 class, 1 for FLUX). ``shift_alpha`` is the default shift of its sigma grids.
    """

    sigma_min, sigma_max = 0.0, 1.0

    def __init__(self, timestep_multiplier: float = 1000.0, shift_alpha: float = 1.0) -> None:
        self.timestep_multiplier = timestep_multiplier
        self.shift_alpha = shift_alpha

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The noised latent at ``sigma`` [B]; ``max_denoise`` changes nothing here (sigma 1 is pure noise already)."""
        sigma = expand_like(sigma, noise)
        return sigma * noise + (1.0 - sigma) * latent_image

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """x0 = x - sigma v."""
        return model_input - expand_like(sigma, model_output) * model_output

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.timestep_multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        """The inverse of ``timestep``."""
        return timestep / self.timestep_multiplier

    def flow_time(self, sigma: Tensor) -> Tensor:
        return sigma

    def sigma_at_flow_time(self, time: Tensor) -> Tensor:
        return time


class DiscreteProcess:
    """Variance-preserving diffusion over a table of timesteps (SD1.5, SD2, SDXL) in the sigma parameterisation.

    x = x0 + sigma noise with sigma = sqrt((1 - a) / a), a the cumulative alpha; the network sees x / sqrt(sigma^2 + 1).
    prediction: ``"eps"`` or ``"v"``. A table that ends in a = 0 (zero terminal SNR) needs ``"v"``: with eps the clean
    image is not a function of the output there.

    Raises ValueError for an unknown prediction, a table that does not fall strictly within [0, 1], or eps with zero
    terminal SNR.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str = "eps") -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
        alphas = alphas_cumprod.detach().double().cpu().flatten().clone()  # the caller's table stays as it is
        falling = len(alphas) > 1 and bool((alphas[1:] < alphas[:-1]).all())
        if not falling or alphas[0] > 1 or alphas[-1] < 0:
            raise ValueError("alphas_cumprod must fall strictly from at most 1 to at least 0")
        if alphas[-1] < ZERO_SNR_ALPHA:
            if prediction == "eps":
                raise ValueError(
                    "eps-prediction is undefined at zero terminal SNR (alpha 0); use a v-prediction model or a table "
                    "whose last alpha is positive"
                )
            alphas[-1] = ZERO_SNR_ALPHA
        self.prediction = prediction
        self._set_table(((1 - alphas) / alphas).sqrt().float())

    def _set_table(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        self.log_sigmas = Table(sigmas.log())

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1].item()

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The noised latent at ``sigma`` [B]. With ``max_denoise`` the noise has variance sigma^2 + 1, so that the
        network's input is exactly unit noise, as the turbo models' first step expects (Stability's SDXL-Turbo demo)."""
        sigma = expand_like(sigma, noise)
        scale = (1.0 + sigma**2).sqrt() if max_denoise else sigma
        return latent_image + scale * noise

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (expand_like(sigma, x) ** 2 + 1.0).sqrt()

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """eps: x - sigma out;  v: x / (sigma^2 + 1) - out sigma / sqrt(sigma^2 + 1);  ``model_input``: unscaled x."""
        sigma = expand_like(sigma, model_output)
        if self.prediction == "eps":
            return model_input - model_output * sigma
        return model_input / (sigma**2 + 1.0) - model_output * sigma / (sigma**2 + 1.0).sqrt()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The nearest trained timestep of each sigma, as int64."""
        distance = (sigma.float().log().unsqueeze(-1) - self.log_sigmas.on(sigma.device)).abs()
        return distance.argmin(dim=-1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Sigma at a (fractional) timestep, interpolated in log sigma; the inverse of ``timestep`` on whole numbers."""
        timestep = timestep.float().clamp(0, len(self.sigmas) - 1)
        low = timestep.floor().long()
        high = (low + 1).clamp(max=len(self.sigmas) - 1)
        weight = timestep - low
        log_sigmas = self.log_sigmas.on(timestep.device)
        return ((1 - weight) * log_sigmas[low] + weight * log_sigmas[high]).exp()

    def flow_time(self, sigma: Tensor) -> Tensor:
        """The flow time with the same signal-to-noise ratio: sigma / (1 + sigma)."""
        return sigma / (1.0 + sigma)

    def sigma_at_flow_time(self, time: Tensor) -> Tensor:
        """sigma = t / (1 - t), kept inside the trained range."""
        limit = self.sigma_max / (1.0 + self.sigma_max)
        time = time.clamp(max=limit)
        return (time / (1.0 - time)).clamp(self.sigma_min, self.sigma_max)


def cumulative_alphas(
    schedule: str = "scaled_linear", start: float = 0.00085, end: float = 0.012, steps: int = 1000
) -> Tensor:
    """Cumulative alphas, float64 [steps]; the defaults are Stable Diffusion's.

    schedule: ``"scaled_linear"`` (betas linear in their square roots) or ``"linear"``; ValueError for another.
    """
    if schedule not in ("scaled_linear", "linear"):
        raise ValueError(f"beta schedule {schedule!r} is not supported; use scaled_linear or linear")
    power = 2 if schedule == "scaled_linear" else 1
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power
    return (1.0 - betas).cumprod(0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha) so that the last is exactly 0 and the first stays (Lin et al. 2023, Algorithm 1)."""
    root = alphas_cumprod.double().sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2
