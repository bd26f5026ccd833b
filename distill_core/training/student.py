"""What the student is: its LoRA, which layers that changes, and what it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..data.dataset import LatentDataset
from ..diffusion.samplers import SAMPLERS
from ..files import check_finite, load_tensors
from ..lora_files import read_lora
from ..models.denoiser import Backend
from ..models.lora import Lora, LoraConfig
from ..models.lora_start import DOWN, MATRIX, start_lora
from ..models.strengths import NAMES, StrengthEmbedding, StrengthsConfig, split_strengths
from ..settings import Checked, setting

ROUNDING = 0.005  # of a strength, in a dataset's files


@dataclass(frozen=True)
class StudentConfig(Checked):
    """The student, and what it is to be sampled with."""

    rank: int = setting(
        64, "Rank of the student's LoRA. 0 trains all weights of a copy of the model instead.", low=0, high=1024
    )
    targets: tuple[str, ...] = setting(
        (),
        "Linear layers that the LoRA trains, by their names or parts of them, such as attn, with * for any characters "
        "(blocks.1*.attn). Those after a ! are left out: !ff. Empty: all in the blocks.",
    )
    sampler: str = setting(
        "renoise", "Sampler that the student is meant for. It is written into the student's file.", choices=SAMPLERS
    )
    sampler_options: dict[str, float] = setting({}, "Options of that sampler, for example eta.")
    lora: LoraConfig = setting(LoraConfig, "Its LoRA beside rank and layers.", added=True)
    strengths: StrengthsConfig = setting(StrengthsConfig, "Whether it is told the strengths to edit at.", added=True)
    cfg: float = setting(
        1.0, "Guidance scale that it is sampled with, written into its file.", added=True, low=0, high=100
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank == 0 and self.lora != LoraConfig():
            raise ValueError(
                "alpha, dropout, start_from and lora_dtype are of a LoRA: leave them as they are to train all weights, "
                "or train a LoRA; to go on from a LoRA with all weights, load it into the model"
            )


def pick_targets(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """The layers that ``wanted`` asks for, in the order of ``names``.

    A text stands for the layer of that name or, where none has it, for all whose names contain it; * and ? stand for
    any characters there. One that begins with ! takes its layers out again. All of them where nothing else is wanted.
    Raises ValueError for a text that fits no layer, and where no layer is left.
    """

    def fitting(text: str) -> list[str]:
        found = [text] if text in names else [name for name in names if fnmatchcase(name, f"*{text}*")]
        if not text or not found:
            raise ValueError(f"LoRA targets: no layer's name contains {text!r}; names look like {', '.join(names[:4])}")
        return found

    included = [name for text in wanted if not text.startswith("!") for name in fitting(text)]
    excluded = [name for text in wanted if text.startswith("!") for name in fitting(text[1:].strip())]
    chosen = (set(included) if any(not text.startswith("!") for text in wanted) else set(names)) - set(excluded)
    if not chosen:
        raise ValueError(f"LoRA targets: {', '.join(wanted)} leave no layer to train")
    return tuple(name for name in names if name in chosen)


def start_from(backend: Backend, lora: Lora, path: Path, strengths: StrengthEmbedding | None = None) -> None:
    """Give a fresh LoRA what a file holds, and the embedding of strengths, where the student has one and so has the
    file. Raises ValueError for one that does not fit."""
    state, _ = load_tensors(path)
    check_finite(state, f"start_from: {path.name}", "choose another LoRA")
    try:
        parts, strange = backend.lora_parts(state)
    except ValueError as error:
        raise ValueError(f"start_from: {path.name}: {error}") from error
    start_lora(lora, parts, strange, path.name)
    embedding = split_strengths(state)[1]
    if strengths is None or not embedding:
        return
    said = read_lora(path)[1].get("strengths", {})
    default = tuple(values[1] for values in (said[name] for name in NAMES if name in said))
    if default != strengths.default:
        raise ValueError(
            f"start_from: {path.name} was trained around other strengths, {default}: set [strengths] text and image to "
            "these"
        )
    try:
        strengths.load_export(embedding)
    except ValueError as error:
        raise ValueError(f"start_from: {path.name}: {error}; set [strengths] width as there") from error


def check_strengths(config: StrengthsConfig, dataset: LatentDataset) -> None:
    """Refuse a student that is told strengths of which the dataset can teach it nothing. Raises ValueError."""
    if not config.told:
        return
    spans = {name: dataset.span(name) for name in NAMES}
    cure = "make the items with ranges in [cache] text_strength and image_strength, or set told = false"
    for name, default in zip(NAMES, (config.text, config.image), strict=True):
        span = spans[name]
        if span is None:
            raise ValueError(f"[strengths] told: the items in {dataset.folder} have no {name}; {cure}")
        if not span[0] * (1 - ROUNDING) <= default <= span[1] * (1 + ROUNDING):
            raise ValueError(
                f"[strengths] {name.removesuffix('_strength')} is {default:g}, and the items in {dataset.folder} were "
                f"made at {spelled(span)}: set it inside of that"
            )
    if all(span is not None and span[0] == span[1] for span in spans.values()):
        raise ValueError(f"[strengths] told: all items in {dataset.folder} have the same strengths; {cure}")


def spelled(span: tuple[float, float]) -> str:
    """ "3 to 10", "1.5"."""
    return f"{span[0]:g}" if span[0] == span[1] else f"{span[0]:g} to {span[1]:g}"


def strengths_told(config: StrengthsConfig, dataset: LatentDataset) -> dict[str, list[float]]:
    """What a student's file says of the strengths that it is told: the lowest, the default and the highest of each."""
    told = {}
    for name, default in zip(NAMES, (config.text, config.image), strict=True):
        low, high = dataset.span(name) or (default, default)
        told[name] = [min(low, default), default, max(high, default)]
    return told


def rank_of_file(path: str | Path) -> int:
    """The highest rank in a LoRA file. Raises ValueError for a file without a LoRA."""
    state, _ = load_tensors(path)
    ranks = [len(value) for key, value in state.items() if (m := MATRIX.fullmatch(key)) and m[2] in DOWN]
    if not ranks:
        raise ValueError(f"start_from: {Path(path).name} holds no LoRA")
    return max(ranks)
