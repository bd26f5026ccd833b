"""Load E-LatentLPIPS and E-LatentLPIPS in the server give the numbers of the headless metric on the mini model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from server import failure_text

from distill_core.diffusion.noise import ItemNoise
from distill_core.perceptual import load_metric
from distill_core.perceptual.weights import SHIPPED

SCALE, SHIFT = 1.5305, 0.0609  # the host's units of SD3 latents: x / SCALE + SHIFT


def graph(weights: str, a: str, b: str) -> dict:
    choice = {"weights": weights, "transforms": "bgco", "draws": 3, "l1": 0.5}
    compare = {"perceptual": ["1", 0], "samples": ["2", 0], "reference": ["3", 0], "seed": 5}
    return {
        "1": {"class_type": "TurboDistillLoadPerceptual", "inputs": choice},
        "2": {"class_type": "LoadLatent", "inputs": {"latent": a}},
        "3": {"class_type": "LoadLatent", "inputs": {"latent": b}},
        "4": {"class_type": "TurboDistillPerceptualDistance", "inputs": compare},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["4", 1], "filename_prefix": "heat"}},
    }


@pytest.fixture(scope="module")
def files(host) -> dict[str, torch.Tensor]:
    """Model-space latents, saved as the host's LoadLatent reads them."""
    g = torch.Generator().manual_seed(0)
    found = {"a": torch.randn(3, 16, 8, 10, generator=g), "one": torch.randn(1, 16, 8, 10, generator=g)}
    found["video"] = torch.randn(1, 16, 2, 8, 10, generator=g)
    folder = host.base_dir / "input"
    folder.mkdir(exist_ok=True)
    for name, x in found.items():
        content = {"latent_tensor": (x / SCALE + SHIFT).contiguous(), "latent_format_version_0": torch.tensor([])}
        save_file(content, folder / f"{name}.latent")
    return found


def test_the_nodes_give_the_headless_numbers(host, files):
    entry = host.run(graph("mini model (shipped)", "a.latent", "one.latent"))
    shown = [float(text) for text in entry["outputs"]["5"]["text"]]
    metric = load_metric(preset="bgco", draws=3, l1=0.5)
    expected = metric(files["a"], files["one"].expand(3, -1, -1, -1), ItemNoise(5, range(3))).tolist()
    assert shown == pytest.approx(expected, rel=1e-4)
    assert len(entry["outputs"]["6"]["images"]) == 3


def test_a_file_in_models_perceptual_is_offered_and_loaded(host, files):
    folder = host.base_dir / "models" / "perceptual"
    folder.mkdir(exist_ok=True)
    (folder / "mine.safetensors").write_bytes((SHIPPED / "mini.safetensors").read_bytes())
    entry = host.run(graph("mine.safetensors", "a.latent", "a.latent"))
    assert [float(text) for text in entry["outputs"]["5"]["text"]] == [0.0] * 3


def test_the_nodes_tell_the_user_what_is_wrong(host, files):
    entry = host.wait(host.queue(graph("mini model (shipped)", "video.latent", "video.latent")))
    assert "video latent" in failure_text(entry) and "frames" in failure_text(entry)
    folder = host.base_dir / "models" / "perceptual"
    folder.mkdir(exist_ok=True)
    state = load_file(SHIPPED / "mini.safetensors")
    save_file(state, folder / "foreign.safetensors")
    entry = host.wait(host.queue(graph("foreign.safetensors", "a.latent", "a.latent")))
    assert "holds no E-LatentLPIPS weights" in failure_text(entry)
