"""FLUX files with quantized blocks, each beside the same weights in float32. Runs inside the host's Python.

The formats are the host's own (`comfy.quant_ops`) and GGUF's. The gguf package does not write the K formats: they are
made here from ggml's description of them (ggml-common.h), and read back by that package, which is the reference.
"""

from __future__ import annotations

import json
from pathlib import Path

import comfy.ldm.flux.model
import comfy.quant_ops
import numpy as np
import tiny_models
import torch
from safetensors.torch import save_file

BLOCKS = ("double_blocks", "single_blocks")
WIDTH = 256  # of a super-block of the K formats, and a group of rotated weights
HOST_FORMATS = [name for name in comfy.quant_ops.QUANT_ALGOS if name not in ("float8_e5m2",)]
GGUF_FORMATS = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")
State = dict[str, torch.Tensor]


def flux() -> tuple[State, list[str]]:
    """A tiny FLUX whose layers are wide enough for every format, and the names of its blocks' linear layers."""
    settings = tiny_models.FLUX | {"hidden_size": WIDTH, "num_heads": WIDTH // 128, "guidance_embed": True}
    state = tiny_models.random_state(comfy.ldm.flux.model.Flux(**settings, **tiny_models.OPS))
    names = [name.removesuffix(".weight") for name in state if name.startswith(BLOCKS) and name.endswith(".weight")]
    return state, [name for name in names if state[f"{name}.weight"].ndim == 2]


def host_files(kind: str, folder: Path) -> tuple[Path, Path]:
    """The file in a format of the host, and that with the weights that it stands for."""
    state, layers = flux()
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    small, options = dict(state), {"scale": "recalculate"} if kind.startswith("float8") else {}
    for layer in layers:
        weight = comfy.quant_ops.QuantizedTensor.from_float(state[f"{layer}.weight"], layout, **options)
        del small[f"{layer}.weight"]
        small |= {
            k: v.view(torch.uint8) if v.dtype == torch.float8_e8m0fnu else v
            for k, v in weight.state_dict(f"{layer}.weight").items()
        }
        said = json.dumps({"format": kind, "convrot_groupsize": WIDTH}).encode()
        small[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
        state[f"{layer}.weight"] = weight.dequantize()
    return saved(folder / f"{kind}.safetensors", small), saved(folder / f"{kind}-plain.safetensors", state)


def gguf_files(kind: str, folder: Path) -> tuple[Path, Path]:
    """A GGUF file, and the safetensors file with the weights that it stands for."""
    import gguf

    state, layers = flux()
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in state.items():
        if name.removesuffix(".weight") not in layers:
            writer.add_tensor(name, value.numpy())
            continue
        number = gguf.GGMLQuantizationType[kind]
        write = {"Q4_K": _q45_k, "Q5_K": _q45_k, "Q6_K": _q6_k}.get(kind)
        raw = write(value.numpy(), kind) if write else gguf.quants.quantize(value.numpy(), number)
        writer.add_tensor(name, raw, raw_dtype=number)
        state[name] = torch.from_numpy(gguf.quants.dequantize(raw, number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, saved(folder / f"{kind}-plain.safetensors", state)


def saved(path: Path, state: State, dtype: torch.dtype | None = None) -> Path:
    """The file, written."""
    save_file({name: value.clone().to(dtype or value.dtype).contiguous() for name, value in state.items()}, path)
    return path


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float16 of values [n], as two bytes each and as float32; never 0."""
    half = np.maximum(values, 1e-6).astype(np.float16)
    return half.view(np.uint8).reshape(-1, 2), half.astype(np.float32)


def _q45_k(weight: np.ndarray, kind: str) -> np.ndarray:
    """8 parts of 32 with a scale and a minimum of 6 bits each, numbers of 4 bits and, in Q5_K, a fifth."""
    top = 31 if kind == "Q5_K" else 15
    parts = weight.reshape(-1, 8, 32)
    low = np.maximum(-parts.min(-1), 0)
    step = (parts.max(-1) + low) / top
    d_bytes, d = _halves(step.max(-1) / 63)
    m_bytes, m = _halves(low.max(-1) / 63)
    scales = np.clip(np.rint(step / d[:, None]), 1, 63).astype(np.uint8)
    lows = np.clip(np.rint(low / m[:, None]), 0, 63).astype(np.uint8)
    size, offset = (d[:, None] * scales)[..., None], (m[:, None] * lows)[..., None]
    q = np.clip(np.rint((parts + offset) / size), 0, top).astype(np.uint8)
    packed = np.concatenate(
        [
            scales[:, :4] | (scales[:, 4:] >> 4) << 6,
            lows[:, :4] | (lows[:, 4:] >> 4) << 6,
            (scales[:, 4:] & 15) | (lows[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    fifth = [np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)] if top == 31 else []
    four = ((q[:, ::2] & 15) | (q[:, 1::2] & 15) << 4).reshape(len(q), -1)
    return np.concatenate([d_bytes, m_bytes, packed, *fifth, four], axis=1).reshape(len(weight), -1)


def _q6_k(weight: np.ndarray, kind: str) -> np.ndarray:
    """16 parts of 16 with a scale of 8 bits each, numbers of 6 bits: 4 and 2."""
    parts = weight.reshape(-1, 16, 16)
    step = np.abs(parts).max(-1) / 31
    d_bytes, d = _halves(step.max(-1) / 127)
    scales = np.clip(np.rint(step / d[:, None]), 1, 127).astype(np.int8)
    q = np.rint(parts / (d[:, None] * scales)[..., None])
    q = (np.clip(q, -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    four = ((q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4).reshape(len(q), -1)
    two = np.bitwise_or.reduce((q >> 4) << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=2).reshape(len(q), -1)
    return np.concatenate([four, two, scales.view(np.uint8), d_bytes], axis=1).reshape(len(weight), -1)
