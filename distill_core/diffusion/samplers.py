"""One short function a sampler, with k-diffusion's and ComfyUI's contract.

    fn(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None) -> x0 [B, C, H, W]

``model(x, sigma [B], **extra_args)`` returns the denoised latent; ``sigmas`` falls and ends in 0; ``callback`` gets a
dict with i, x, sigma, sigma_hat and denoised; ``noise_sampler(sigma, sigma_next)`` returns unit noise like x, by
default one generator per batch item (`noise.ItemNoise`) from ``extra_args["seed"]``. Samplers that add noise need
``process`` (``noise_scaling`` and ``flow_time``), by default that of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from tqdm import tqdm, trange

from ..devices import like
from .noise import ItemNoise
from .process import FlowProcess, NoiseProcess, TimestepProcess

NoiseSampler = Callable[[float, float], Tensor]
Step = Callable[[Tensor, float, float, Tensor], Tensor]  # (x, sigma, sigma_next, denoised) -> the next x
StepCallback = Callable[[dict], None]


class Model(Protocol):
    """What a sampler walks with, ``model(x, sigma, **extra_args) -> denoised``, and its noise process."""

    @property
    def process(self) -> NoiseProcess: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


def item_noise_sampler(x: Tensor, seed: int = 0) -> NoiseSampler:
    """Fresh unit noise per call; row i depends only on (seed, i). Offset from the initial noise of the same seed."""
    noise = ItemNoise(seed + 1, range(len(x)))
    return lambda sigma, sigma_next: noise.normal_like(x)


def _scaled(noise_sampler: NoiseSampler, process: NoiseProcess) -> NoiseSampler:
    """Fresh noise as strong as the process wants it: HiDream-O1's host process has a ``noise_scale`` of 8.

    For samplers that add it themselves; ``noise_scaling`` already does.
    """
    scale = getattr(process, "noise_scale", 1.0)
    return noise_sampler if scale == 1 else lambda sigma, sigma_next: scale * noise_sampler(sigma, sigma_next)


def _run(
    step: Step,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None,
    callback: StepCallback | None,
    disable: bool | None,
) -> Tensor:
    """Apply ``step(x, sigma, sigma_next, denoised) -> x`` along the grid; at level 0 the sample is ``denoised``."""
    levels = sigmas.tolist()  # once: reading them from a device tensor would wait for the device at each step
    for i in trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, x.new_full((len(x),), sigma), **(extra_args or {}))
        if callback is not None:
            callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised if sigma_next == 0 else step(x, sigma, sigma_next, denoised)
    return x


def sample_renoise(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: NoiseProcess | None = None,
) -> Tensor:
    """Predict x0, re-noise it to the next level with fresh noise, repeat: the consistency sampler (Song et al. 2023,
    Algorithm 1), LADD's sampler at 2 and 4 steps, ComfyUI's ``lcm``."""
    process = process or model.process
    noise_sampler = noise_sampler or item_noise_sampler(x, (extra_args or {}).get("seed", 0))

    def step(x: Tensor, sigma: float, sigma_next: float, denoised: Tensor) -> Tensor:
        return process.noise_scaling(x.new_tensor(sigma_next), noise_sampler(sigma, sigma_next), denoised)

    return _run(step, model, x, sigmas, extra_args, callback, disable)


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Deterministic Euler steps of the probability-flow ODE (Karras et al. 2022, Algorithm 2 without churn); the same
    formula serves flow and variance-preserving sigmas. FLUX.1 schnell's and SDXL-Lightning's sampler."""

    def step(x: Tensor, sigma: float, sigma_next: float, denoised: Tensor) -> Tensor:
        return x + (x - denoised) / sigma * (sigma_next - sigma)

    return _run(step, model, x, sigmas, extra_args, callback, disable)


def sample_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: NoiseProcess | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Euler steps to a lower level, then noise up to the asked one (k-diffusion's ancestral step). ``eta`` in [0, 1]
    scales the added noise; 0 is Euler. Flow models use the rectified-flow form, which keeps x = (1 - sigma) x0 +
    sigma noise. SD-Turbo's and SDXL-Turbo's sampler."""
    process = process or model.process
    noise_sampler = _scaled(noise_sampler or item_noise_sampler(x, (extra_args or {}).get("seed", 0)), process)
    step_fn = _ancestral_flow if isinstance(process, FlowProcess) else _ancestral

    def step(x: Tensor, sigma: float, sigma_next: float, denoised: Tensor) -> Tensor:
        return step_fn(x, sigma, sigma_next, denoised, noise_sampler, eta)

    return _run(step, model, x, sigmas, extra_args, callback, disable)


def _ancestral(
    x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, noise_sampler: NoiseSampler, eta: float
) -> Tensor:
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    down = (sigma_next**2 - up**2) ** 0.5
    x = x + (x - denoised) / sigma * (down - sigma)
    return x + noise_sampler(sigma, sigma_next) * up if up > 0 else x


def _ancestral_flow(
    x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, noise_sampler: NoiseSampler, eta: float
) -> Tensor:
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    x = (down / sigma) * x + (1 - down / sigma) * denoised
    if eta == 0:
        return x
    signal = (1 - sigma_next) / (1 - down)  # brings the clean part of x from level `down` to level `sigma_next`
    renoise = (sigma_next**2 - (down * signal) ** 2) ** 0.5
    return signal * x + noise_sampler(sigma, sigma_next) * renoise


def sample_tcd(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: NoiseProcess | None = None,
    eta: float = 0.3,
) -> Tensor:
    """Strategic stochastic sampling (Trajectory Consistency Distillation, Zheng et al. 2024, Algorithm 4; gamma there).

    A deterministic jump to the timestep (1 - eta) t of the next level t, then noise up to t. ``eta`` in [0, 1]: 0 is
    Euler, 1 re-noises from the cleanest level. On flow models the timestep is sigma itself.
    """
    process = process or model.process
    noise_sampler = _scaled(noise_sampler or item_noise_sampler(x, (extra_args or {}).get("seed", 0)), process)
    is_flow, table = isinstance(process, FlowProcess), cast(TimestepProcess, process)

    def step(x: Tensor, sigma: float, sigma_next: float, denoised: Tensor) -> Tensor:
        below = (1 - eta) * sigma_next if is_flow else _sigma_at_share(table, sigma_next, 1 - eta)
        if below >= sigma_next:
            return x + (x - denoised) / sigma * (sigma_next - sigma)
        x = x + (x - denoised) / sigma * (below - sigma)
        signal = (1 - sigma_next) / (1 - below) if is_flow else 1.0
        return signal * x + (sigma_next**2 - (signal * below) ** 2) ** 0.5 * noise_sampler(sigma, sigma_next)

    return _run(step, model, x, sigmas, extra_args, callback, disable)


def _sigma_at_share(process: TimestepProcess, sigma: float, share: float) -> float:
    """The sigma at ``share`` of the timestep of ``sigma``, rounded down as in diffusers' TCDScheduler."""
    timestep = process.timestep(torch.tensor([sigma]))
    return process.sigma((share * timestep + 1e-4).floor()).item()


def sample_scm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: NoiseProcess | None = None,
    eta: float = 1.0,
) -> Tensor:
    """TrigFlow steps, x = cos(t) x0 + sin(t) noise (sCM, Lu & Song 2024, section 4; SANA-Sprint's sampler).

    tan t is the noise-to-signal ratio of a level. The noise of the next level is fresh by the share ``eta`` in [0, 1]
    and predicted by the rest: 1 is sCM's full re-noising, 0 the deterministic step of the flow ODE.
    """
    process = process or model.process
    noise_sampler = _scaled(noise_sampler or item_noise_sampler(x, (extra_args or {}).get("seed", 0)), process)
    is_flow = isinstance(process, FlowProcess)

    def step(x: Tensor, sigma: float, sigma_next: float, denoised: Tensor) -> Tensor:
        noise = (x - (1 - sigma if is_flow else 1.0) * denoised) / sigma
        if eta > 0:
            noise = (1 - eta**2) ** 0.5 * noise + eta * noise_sampler(sigma, sigma_next)
        return (1 - sigma_next if is_flow else 1.0) * denoised + sigma_next * noise

    return _run(step, model, x, sigmas, extra_args, callback, disable)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "renoise": sample_renoise,
    "euler": sample_euler,
    "ancestral": sample_ancestral,
    "tcd": sample_tcd,
    "scm": sample_scm,
}


@torch.no_grad()
def sample(
    model: Model,
    process: NoiseProcess,
    sigmas: Tensor,
    cond,
    shape: Sequence[int],
    *,
    seed: int,
    items: Sequence[int],
    sampler: str = "renoise",
    purpose: str = "",
    disable: bool = True,
    **options,
) -> Tensor:
    """Latents [len(items), *shape] from pure noise: row i's noise, initial and injected, is from (seed, items[i]).

    cond: of that many rows, with a ``device``: `models.denoiser.Cond`.  purpose: names the stream of that noise
    (`ItemNoise`).  options: of the sampler, e.g. ``eta``.
    """
    noise = ItemNoise(seed, items, purpose)
    x = noise.normal(*shape).to(cond.device)
    sigma = x.new_full((len(x),), sigmas[0].item())
    x = process.noise_scaling(sigma, x, torch.zeros_like(x), max_denoise=True)
    return SAMPLERS[sampler](
        model, x, sigmas, {"cond": cond}, disable=disable, noise_sampler=lambda s, n: noise.normal_like(x), **options
    )


def sample_many(
    model: Model,
    sigmas: Tensor,
    conds,
    shape: Sequence[int],
    *,
    seed: int,
    count: int,
    size: int = 50,
    progress: bool = False,
    per_item: Mapping[str, Tensor] | None = None,
    **options,
) -> Tensor:
    """``count`` latents in batches of ``size``: item i has the noise of (seed, i) and conditioning i mod len(conds).

    progress: show a bar.  per_item: tensors of ``count`` rows by name, of which item i has row i
    (`models.items.ITEM_TENSORS`).  options: of `sample`. Raises ValueError for another number of rows.
    """
    parts = []
    for name, value in (per_item or {}).items():
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} rows for {count} items: give one for each")
    for start in tqdm(range(0, count, size), desc=f"sample: {len(sigmas) - 1} steps", disable=not progress):
        items = range(start, min(start + size, count))
        cond = conds[[i % len(conds) for i in items]]
        if per_item:
            cond = cond.with_items(
                {name: like(value[items.start : items.stop], cond.context) for name, value in per_item.items()}
            )
        parts.append(sample(model, model.process, sigmas, cond, shape, seed=seed, items=items, **options))
    return torch.cat(parts)
