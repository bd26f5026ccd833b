"""The shipped mini model through ComfyUI's own loaders: same numbers as headless, and the server accepts the files."""

from __future__ import annotations

import pytest
import torch
from shipped import host_and_ours

from distill_core.models import mini
from distill_core.models.mini import mini_backend, mini_conditioning


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """(the host's outputs, our outputs, what the host printed)."""
    cond = mini_conditioning()[0][[0, 4, 9]]
    return host_and_ours(tmp_path_factory.mktemp("probe"), "mini", mini_backend(), cond, mini.load_autoencoder())


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
