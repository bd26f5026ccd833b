"""Weights of the metric on disk: our safetensors file, and its making from the published checkpoints.

Nothing is downloaded. The published .pth files (`SPACES`; CC-BY-NC) are read with torch's
weights-only reader, which runs no code, and converted once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import load_tensors, save_tensors
from ..lora_files import NAMESPACE
from ..models.families import FAMILIES, LatentSpace
from .metric import ELatentLPIPS
from .trunk import DEPTHS, FrozenTrunk, TrunkConfig

FORMAT = "1"
SHIPPED = Path(__file__).parents[1] / "assets" / "perceptual"


NUMBERS = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)  # of the convolutions in torchvision's VGG16-BN

# The published checkpoints, by the family whose latents they compare.
SPACES = {name: family.space for name, family in FAMILIES.items() if family.space is not None}


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(
    path: str | Path, trunk: dict[str, Tensor], heads: Sequence[Tensor], space: LatentSpace, description: dict
) -> None:
    """Write a metric: state of a `TrainableTrunk`, five heads [C], the latent space and where they come from."""
    state = {f"trunk.{name}": value for name, value in trunk.items() if "num_batches" not in name}
    state |= {f"heads.{i}": head for i, head in enumerate(heads)}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    facts = {"metric": FORMAT, "scale": space.scale, "shift": space.shift, "sha256": content_hash(state), **description}
    texts = {NAMESPACE + k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    save_tensors(path, state, {"format": "pt", **texts})


def load_metric(path: str | Path | None = None, dtype: torch.dtype = torch.float32, **options) -> ELatentLPIPS:
    """A metric from a file of `save_weights`; without a path the one shipped for the mini model's latents.

    options: preset, draws, l1 of `ELatentLPIPS`.  Raises ValueError for another kind of file or a damaged one.
    """
    path = Path(path or SHIPPED / "mini.safetensors")
    if {".pth", ".pt", ".ckpt", ".tar"} & set(path.suffixes):
        raise ValueError(f"{path.name} must be converted once: python -m distill_core perceptual convert --help")
    tensors, metadata = load_tensors(path)
    facts = {k.removeprefix(NAMESPACE): v for k, v in metadata.items() if k.startswith(NAMESPACE)}
    if facts.get("metric") != FORMAT:
        raise ValueError(
            f"{path} holds no E-LatentLPIPS weights of this project; make them with `python -m distill_core "
            "perceptual train`, or convert a published checkpoint with `perceptual convert`"
        )
    if facts.get("sha256") != content_hash(tensors):
        raise ValueError(f"{path} is damaged: its content does not have the hash it was written with; make it again")
    scale, shift = (_number(facts, name, path) for name in ("scale", "shift"))
    if scale == 0:
        raise ValueError(f"{path} is damaged: the scale of its latents is 0; make it again")
    heads = [tensors.pop(f"heads.{i}").float() for i in range(len(DEPTHS))]
    trunk = {name.removeprefix("trunk."): value for name, value in tensors.items()}
    config = TrunkConfig(trunk["convs.0.weight"].shape[1], tuple(len(head) for head in heads))
    return ELatentLPIPS(FrozenTrunk(config, trunk, dtype), heads, scale=scale, shift=shift, **options)


def _number(facts: dict[str, str], name: str, path: Path) -> float:
    try:
        value = float(facts.get(name, ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path} is damaged: {name} of its latents is {facts.get(name)!r}, no number; make it again")
    return value


def convert_published(paths: Sequence[str | Path], model: str, out: str | Path, sha256: str | None = None) -> dict:
    """Published checkpoint (one file, or trunk and heads in two) -> our file; returns what was found.

    Of several files one that holds trunk and heads is used alone: the published pair is such a file and the trunk that
    it began as.

    model: one of `SPACES`.  sha256: of the first file, checked when given; it is written into the result anyway.
    Negative head weights become 0, and the result says how many. Raises ValueError for a file that does not hold the
    thirteen convolutions, their normalisations and the five heads of the published network.
    """
    if model not in SPACES:
        raise ValueError(f"model must be one of {list(SPACES)}, not {model!r}")
    digest = hashlib.sha256(_read(paths[0])).hexdigest()
    if sha256 and digest != sha256.lower():
        raise ValueError(f"{paths[0]} has SHA-256 {digest}, not the expected {sha256}; download it again")
    states, config = [_tensors_of(path) for path in paths], TrunkConfig(SPACES[model].channels)
    whole = [number for number, state in enumerate(states) if _fits(state, config)]
    if len(whole) > 1:
        raise ValueError(
            f"each of {', '.join(str(paths[number]) for number in whole)} is a whole metric; give the one you want"
        )
    if whole and len(paths) > 1:
        digest = hashlib.sha256(_read(paths[whole[0]])).hexdigest()
    trunk, heads = arrange(states[whole[0]] if whole else dict(ChainMap(*states[::-1])), config)
    negative = sum(int((head < 0).sum()) for head in heads)
    found = {"model": model, "source_sha256": digest, "negative_head_weights_clamped": negative}
    save_weights(out, trunk, [head.clamp(min=0) for head in heads], SPACES[model], found)
    return found


def _fits(state: dict[str, Tensor], config: TrunkConfig) -> bool:
    try:
        arrange(state, config)
    except ValueError:
        return False
    return True


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _tensors_of(path: str | Path) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of plain tensors ({type(error).__name__}); one that needs code to be unpickled is "
            "not opened"
        ) from error
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    return {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}


def arrange(state: dict[str, Tensor], config: TrunkConfig) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Trunk and heads of a VGG16-BN metric, told by shape and by the numbers in their names, whatever their prefix.

    Layers count in the order of the numbers in their names: torchvision's ``features.N``, LPIPS's ``sliceK.N``. The
    last number must be that of torchvision's VGG16-BN. It counts the max-pools, too, which have no weights: a network
    that pools elsewhere has the same shapes and other numbers.
    Raises ValueError where the shapes are not those of ``config``, or the numbers are others.
    """

    def order(prefix: str) -> tuple[list[int], str]:
        return [int(n) for n in re.findall(r"\d+", prefix)], prefix

    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        prefix, _, leaf = name.rpartition(".")
        modules.setdefault(prefix, {})[leaf] = value
    ordered = {prefix: modules[prefix] for prefix in sorted(modules, key=order)}
    weights = [module for module in ordered.values() if "weight" in module]
    convs = [m for m in weights if m["weight"].shape[2:] == (3, 3)]
    numbers = [(order(prefix)[0] or [-1])[-1] for prefix, m in ordered.items() if any(m is conv for conv in convs)]
    norms = [m for m in weights if "running_mean" in m]
    heads = [m["weight"].flatten() for m in weights if m["weight"].ndim == 4 and m["weight"].shape[2:] == (1, 1)]
    if len(heads) == 2 * len(DEPTHS) and all(map(torch.equal, heads[::2], heads[1::2])):
        heads = heads[::2]  # registered twice, one by one and in a list
    expected = [(o, i, 3, 3) for i, o in config.layers()]
    fits = [tuple(m["weight"].shape) for m in convs] == expected
    fits &= [len(m["running_mean"]) for m in norms] == [o for o, *_ in expected]
    if not fits or [len(head) for head in heads] != list(config.widths):
        raise ValueError(
            f"this is not a checkpoint of a VGG16-BN metric for {config.channels}-channel latents: found "
            f"{len(convs)} convolutions, {len(norms)} normalisations and {len(heads)} heads"
        )
    if numbers != list(NUMBERS):
        raise ValueError(
            f"this is a checkpoint of another network: its convolutions are numbered {numbers}, those of the published "
            f"metric {list(NUMBERS)}; it normalises or pools elsewhere, so its weights would give another distance here"
        )
    trunk = {f"convs.{i}.{leaf}": m[leaf].float() for i, m in enumerate(convs) for leaf in ("weight", "bias")}
    parts = ("weight", "bias", "running_mean", "running_var")
    trunk |= {f"norms.{i}.{leaf}": m[leaf].float() for i, m in enumerate(norms) for leaf in parts}
    return trunk, [head.float() for head in heads]
