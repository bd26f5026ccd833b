"""Model files at full size with random weights in bfloat16, as ComfyUI's loaders take them.

Runs in ComfyUI's Python:  python tests/full_size/write_models.py MODELS NETWORK FILE [MODELS NETWORK FILE ...]

MODELS: the folder of models.  NETWORK: of full_networks.py, "dinov2", or "tae4": a tiny autoencoder of 4 (16, 128)
channels).  FILE: where in MODELS; in checkpoints/ the tiny autoencoder of the network's latents is in the same file.
One tensor at a time is in memory.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

ARGUMENTS = sys.argv[1:]  # entering the host takes them
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host"))
from launch import comfyui_folder, enter_host  # noqa: E402

enter_host()

import comfy.image_encoders.dino2  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
import torch  # noqa: E402
from full_networks import with_few_blocks  # noqa: E402

BF16 = torch.bfloat16
CHUNK = 1 << 24  # values that are drawn at once


def shapes_of(network: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in network.state_dict().items()}


def autoencoder(channels: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(comfy.taesd.taesd.TAESD(latent_channels=channels), prefix)


def vision() -> dict[str, tuple[int, ...]]:
    """DINOv2-large."""
    config = json.loads((comfyui_folder() / "comfy" / "image_encoders" / "dino2_large.json").read_text())
    with torch.device("meta"):
        return shapes_of(comfy.image_encoders.dino2.Dinov2Model(config, BF16, "meta", comfy.ops.disable_weight_init))


def tensors_of(name: str, file: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a file holds."""
    if name == "dinov2":
        return vision()
    if name.startswith("tae"):
        whole = autoencoder(int(name[3:]))
        part = next((part for part in ("encoder", "decoder") if file.endswith(f"_{part}.safetensors")), None)
        return {k.removeprefix(f"taesd_{part}."): v for k, v in whole.items() if part is None or f"taesd_{part}." in k}
    inner, _ = with_few_blocks(name).on_meta(BF16)
    if not file.startswith("checkpoints/"):
        return shapes_of(inner.diffusion_model)
    tiny = autoencoder(inner.latent_format.latent_channels, "first_stage_model.")
    return shapes_of(inner.diffusion_model, "model.diffusion_model.") | tiny


def values_of(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The tensor's values in bfloat16, in pieces: at 0.7 / sqrt(inputs) no layer is silent and none explodes."""
    if not shape:  # scale and shift of an autoencoder
        yield torch.tensor([0.0 if name.endswith("shift") else 1.0], dtype=BF16)
        return
    inputs = torch.Size(shape[1:]).numel()
    left = torch.Size(shape).numel()
    while left:
        count = min(left, CHUNK)
        yield torch.randn(count, generator=generator).mul_(0.7 / inputs**0.5).to(BF16)
        left -= count


def write(name: str, models: Path, file: str) -> None:
    """Write MODELS/FILE, the same for the same network; the format is safetensors'."""
    shapes, header, at = tensors_of(name, file), {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    path = models / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for key, shape in shapes.items():
            for values in values_of(key, shape, generator):
                out.write(values.view(torch.uint8).numpy().data)


if __name__ == "__main__":
    models, *wanted = ARGUMENTS
    for name, file in zip(wanted[::2], wanted[1::2], strict=True):
        write(name, Path(models), file)
