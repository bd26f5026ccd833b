"""What benchmarks of several commands share: running them on ready configs, and what tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from torch import Tensor

from distill_core.cli.main import main as command
from distill_core.data.dataset import LatentDataset
from distill_core.evaluation.intervals import Figure
from distill_core.files import load_tensors, save_tensors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run(*words: str | Path | int) -> None:
    if command([str(word) for word in words]):
        raise SystemExit(1)


def changed(name: str, to: Path, lines: Mapping[str, str]) -> Path:
    """A ready config with other lines, each in the place of the one that begins as its key does; written to ``to``."""
    text = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    for start, line in lines.items():
        (place,) = [i for i, old in enumerate(text) if old.startswith(start)]
        text[place] = line
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(text) + "\n", encoding="utf-8")
    return to


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` gives, or what it gave before and ``path`` holds."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"latents": make().contiguous()})
    return load_tensors(path)[0]["latents"]


def dataset(folder: Path, config: Path, seed: int, count: int, edits: bool = False) -> LatentDataset:
    """Scenes, or edits of some, that the command draws, encoded as a config says; made once."""
    pictures = folder / "pictures"
    if not (folder / "done").exists():
        run("scenes", "--out", pictures, "--count", count, "--seed", seed, *(["--edits"] if edits else []))
        run("cache", config, "--images", pictures / "after" if edits else pictures, "--out", folder / "data")
        (folder / "done").touch()
    return LatentDataset(folder / "data")


def captions(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]


def spelled(values: list[float], lower_is_better: bool = True) -> str:
    """The median, and the worst beside it."""
    return f"{median(values):.3g} ({(max if lower_is_better else min)(values):.3g})"


def ratio(figure: Figure, to: Figure) -> Figure:
    """One figure in parts of another, with the interval of that."""
    return Figure(figure.value / to.value, figure.replicates / to.replicates)
