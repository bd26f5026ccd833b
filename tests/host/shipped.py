"""What the host and the core compute with a shipped model, from the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from server import run_probe
from torch import Tensor

from distill_core.lora_files import save_lora
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Cond, Denoiser


def host_and_ours(
    folder: Path, name: str, backend: DiffusersBackend, cond: Cond, autoencoder: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """(the host's outputs, our outputs, what the host printed) of `probe_shipped`; cond has three rows."""
    path, generator = backend.new_lora(rank=4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in path.up:
            up.copy_(0.05 * torch.randn(up.shape, generator=generator))
        x, sigma = torch.randn(3, 16, 8, 8, generator=generator), torch.tensor([1.0, 0.75, 0.3])
        image = (autoencoder.decoder(x) + 1) / 2
        ours = {
            "denoised": Denoiser(backend)(x, sigma, cond),
            "with_lora": Denoiser(backend, path)(x, sigma, cond),
            "decoded": image.clamp(0, 1).permute(0, 2, 3, 1),
            "encoded": autoencoder.encoder(image.clamp(0, 1) * 2 - 1),
        }
    save_lora(folder / "student.safetensors", path.export(), {"sigmas": [1.0]})
    inputs = {"x": x, "sigma": sigma, "context": cond.context, "pooled": cond.pooled, "image": ours["decoded"]}
    save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "in.safetensors")
    (folder / "name").write_text(name)
    printed = run_probe("probe_shipped.py", folder)
    return load_file(folder / "out.safetensors"), ours, printed
