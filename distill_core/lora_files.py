"""LoRA files: diffusers' key layout, and what the LoRA is and needs as ``turbo_distill.*`` metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import first_line
from .files import check_finite, load_tensors, save_tensors

NAMESPACE = "turbo_distill."
LORA_FORMAT = "1"


def save_lora(path: str | Path, state: dict[str, Tensor], description: dict) -> None:
    """A LoRA in diffusers' key layout with ``turbo_distill.*`` metadata.

    description: method, sigmas (student levels), sampler, sampler_options, cfg, prediction, family, base
    (digest), steps, config; reference_pixels of a picture that the sigmas are for, where those of others are shifted;
    strengths of a student that is told them, by name [lowest, default, highest]; from ComfyUI also base_layout and
    below (`presets.origin`).
    Every value becomes a string; what is not one is written as JSON.
    """
    description = {"format": LORA_FORMAT, **description}
    texts = {NAMESPACE + k: v if isinstance(v, str) else json.dumps(v) for k, v in description.items()}
    save_tensors(path, state, {"format": "pt", **texts})


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """State and description of a LoRA written by `save_lora`. Raises ValueError for another or a damaged file.

    One that is used as the model itself is (Diffusion-DPO) has no sigmas and no sampler in its description.
    """
    state, metadata = load_tensors(path)
    description = {k.removeprefix(NAMESPACE): v for k, v in metadata.items() if k.startswith(NAMESPACE)}
    if not description.keys() & {"sigmas", "method"}:
        raise ValueError(f"{path} carries no turbo_distill metadata; it was not written by this project")
    check_lora(state, path)
    try:
        return state, parse_description(description)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; train it again, or restore a copy") from error


def check_lora(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError for a value that is not finite, and for one of a layer's two matrices without the other."""
    cure = "train it again, or restore a copy"
    check_finite(state, path, cure)
    for name in state:
        other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        if other not in state:
            raise ValueError(f"{path} is damaged: it has {name} and not {other}; {cure}")


STORED = {
    "sigmas": list,
    "sampler_options": dict,
    "cfg": float,
    "embedded_guidance": float,
    "strengths": dict,
    "reference_pixels": int,
    "steps": int,
    "config": dict,
    "below": list,
    "added": list,
}  # not as plain text


def parse_description(texts: Mapping[str, str]) -> dict:
    """The values of the ``turbo_distill.*`` texts of a LoRA. Raises ValueError for values that are of another kind.

    sigmas are finite, above 0 and falling; cfg and the sampler's options are finite numbers.
    """
    description: dict[str, Any] = dict(texts)
    for name, kind in STORED.items():
        if name in description:
            description[name] = _parse(texts[name], kind, f"its entry {name}")
    sigmas, options = description.get("sigmas", [1.0]), description.get("sampler_options", {})
    if not sigmas or not all(_is_number(s) and s > 0 for s in sigmas):
        raise ValueError(f"its noise levels (sigmas) are {str(sigmas):.60}, not numbers above 0")
    if any(a <= b for a, b in zip(sigmas, sigmas[1:], strict=False)):
        raise ValueError(f"its noise levels (sigmas) do not fall: {str(sigmas):.60}")
    if not all(
        map(_is_number, [description.get("cfg", 1.0), description.get("embedded_guidance", 1.0), *options.values()])
    ):
        raise ValueError(f"cfg or the sampler's options are no finite numbers: {str(options):.60}")
    if not 0 < description.get("reference_pixels", 1) < 1e12:
        raise ValueError(f"its reference_pixels are {str(description['reference_pixels']):.60}, not a size of pictures")
    strengths = description.get("strengths")
    if strengths is not None and set(strengths) != {"text_strength", "image_strength"}:
        raise ValueError(f"its strengths are of {str(list(strengths)):.60}, not of text and picture")
    for name, values in (strengths or {}).items():
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            raise ValueError(f"its {name} is {str(values):.60}, not the lowest, the default and the highest number")
    return description


def _parse(text: str, kind: type, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({first_line(error)})") from error
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise ValueError(f"{where} is {type(value).__name__} where {kind.__name__} is wanted")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
