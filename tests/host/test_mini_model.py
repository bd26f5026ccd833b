"""The shipped mini model through ComfyUI's own loaders: same numbers as headless, and the server accepts the files."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from server import COMFYUI, HERE, PYTHON

from distill_core.lora_files import save_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser
from distill_core.models.mini import mini_backend, mini_conditioning


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """(inputs, the host's outputs, our outputs, what the host printed)."""
    folder = tmp_path_factory.mktemp("probe")
    backend, (classes, _) = mini_backend(), mini_conditioning()
    path = backend.new_lora(rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in path.up:
            up.copy_(0.05 * torch.randn(up.shape, generator=generator))
    x = torch.randn(3, *mini.LATENT_SHAPE, generator=generator)
    sigma, cond = torch.tensor([1.0, 0.75, 0.3]), classes[[0, 4, 9]]
    autoencoder = mini.load_autoencoder()
    with torch.no_grad():
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
    files = [mini.ASSETS / "transformer.safetensors", mini.ASSETS / "autoencoder.safetensors"]
    command = [PYTHON, HERE / "probe_mini.py", *files, *(folder / n for n in ("student.safetensors", "in.safetensors"))]
    environment = os.environ | {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, folder / "out.safetensors"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out.safetensors"), ours, done.stdout + done.stderr


TOLERANCES = {"denoised": 1e-5, "with_lora": 1e-4, "decoded": 1e-4, "encoded": 1e-3}


@pytest.mark.parametrize(("name", "tolerance"), TOLERANCES.items())
def test_the_host_computes_the_same(probe, name, tolerance):
    host, ours, _ = probe
    assert host[name].shape == ours[name].shape
    torch.testing.assert_close(host[name], ours[name], rtol=0, atol=tolerance)


def test_the_host_recognises_the_family_and_maps_every_lora_key(probe):
    _, _, printed = probe
    assert "family: SD3" in printed
    assert "lora key not loaded" not in printed


def test_the_lora_changes_the_hosts_output(probe):
    host, _, _ = probe
    assert (host["with_lora"] - host["denoised"]).abs().max() > 1e-2


def test_the_server_loads_both_files(host):
    """UNETLoader -> ModelSave and VAELoader -> VAESave run in the real server."""
    unet = host.add_model("diffusion_models", mini.ASSETS / "transformer.safetensors", "mini-transformer.safetensors")
    vae = host.add_model("vae", mini.ASSETS / "autoencoder.safetensors", "mini-autoencoder.safetensors")
    host.run(
        {
            "1": {"class_type": "UNETLoader", "inputs": {"unet_name": unet, "weight_dtype": "default"}},
            "2": {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "mini"}},
            "3": {"class_type": "VAELoader", "inputs": {"vae_name": vae}},
            "4": {"class_type": "VAESave", "inputs": {"vae": ["3", 0], "filename_prefix": "mini-vae"}},
        }
    )
    saved = [path.name for path in (host.base_dir / "output").glob("mini*.safetensors")]
    assert sorted(name.split("_")[0] for name in saved) == ["mini", "mini-vae"]
