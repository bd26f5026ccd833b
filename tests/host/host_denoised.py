"""What the host's own samplers get from a MODEL. Runs inside the host's Python."""

from __future__ import annotations

import comfy.samplers
import torch


def host_denoised(model, positive: list, x: torch.Tensor, sigma: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """What a sampler of the host gets from MODEL at cfg 1 for latents in model space, rows one by one."""
    guider = comfy.samplers.CFGGuider(model)
    seen = []

    def sampler_function(inner, x_host, sigmas, extra_args=None, callback=None, disable=None):
        layout = x_host.ndim
        for row in range(len(x)):
            one = x[row : row + 1].unsqueeze(2) if layout == 5 else x[row : row + 1]
            seen.append(inner(one, sigma[row : row + 1], **extra_args))
        return x_host

    empty = torch.zeros(1, *x.shape[1:])
    if model.get_model_object("latent_format").latent_dimensions == 3:
        empty = empty.unsqueeze(2)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    sampler = comfy.samplers.KSAMPLER(sampler_function)
    guider.sample(empty, empty, sampler, torch.tensor([sigma.max().item(), 0.0]), seed=seed)
    return torch.cat(seen).squeeze(2) if seen[0].ndim == 5 else torch.cat(seen)
